"""The null runner: tokens from a script instead of a model, for tests and for measuring the pipeline. No torch.

The next id is a pure function of the ids so far (and of the choice and seed in "hash"), so that chunking, batching,
pre-emption and continuation cannot change a text. `null_script` is a mode and options, separated by semicolons:

Where a grammar rules and forbids the id, one of those that it allows comes instead.

    echo            repeats the prompt's ids, cyclically
    say             repeats the prompt's ids once, and ends: with a template that is the last message, what one likes
    count           the last id plus one, modulo the vocabulary
    hash            a hash of the last four ids and, unless greedy, the seed and the choice (the default)
    eos_after=N     the output id number N (from 0) is the end of sequence
    hang_at=N       the output id number N of a choice without history never comes: the loop hangs for good, as a
                    wrong kernel or a deadlock would make it. The successor, which has a history, passes.
"""
from __future__ import annotations

import time
from collections.abc import Sequence as Ids
from dataclasses import dataclass
from typing import NamedTuple, NoReturn
from zlib import crc32

import numpy as np

from engine_proc.plan import Candidates, ItemResult, StepPlan
from engine_proc.request import Sequence
from pipeline.config import EngineConfig
from pipeline.errors import StartError, unsupported
from pipeline.exits import CONFIG
from pipeline.messages import Logprobs

DEFAULT_BLOCKS = 4096
DEFAULT_VOCAB = 32_000
MODES = ("hash", "echo", "say", "count")
NUMBERS = ("eos_after", "hang_at")
WINDOW = 4                    # ids that "hash" looks at


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A parsed `null_script`."""

    mode: str = "hash"
    eos_after: int | None = None
    hang_at: int | None = None

    @classmethod
    def parse(cls, text: str) -> Script:
        mode, numbers = "hash", dict[str, int]()
        for part in filter(None, (p.strip() for p in text.split(";"))):
            name, _, value = part.partition("=")
            if name in MODES and not value:
                mode = name
            elif name in NUMBERS and value.isdigit():
                numbers[name] = int(value)
            else:
                raise StartError(CONFIG, f"The null engine's script does not know '{part}'.")
        return cls(mode=mode, **numbers)

    def next_id(self, seq: Sequence, ids: Ids[int], vocab_size: int) -> int:
        """The id that follows `ids` (prompt and output so far) in `seq`."""
        output = len(ids) - seq.num_prompt
        if output == self.hang_at and not seq.num_history:
            _hang()
        may_end = output >= seq.sampling.min_tokens
        end = seq.num_prompt if self.mode == "say" else self.eos_after
        if end is not None and output >= end and may_end and seq.eos_id >= 0:
            return seq.eos_id
        if self.mode in ("echo", "say"):
            token = ids[output % seq.num_prompt]
        elif self.mode == "count":
            token = (ids[-1] + 1) % vocab_size
        else:
            state = b"" if seq.sampling.greedy else seq.sampling.seed.to_bytes(8, "little") + bytes([seq.choice])
            token = crc32(b"".join(i.to_bytes(4, "little") for i in ids[-WINDOW:]), crc32(state)) % vocab_size
        while token == seq.eos_id or (token in seq.stops and not may_end):     # eos_after alone ends a sequence
            token = (token + 1) % vocab_size
        return int(token)


class _Step(NamedTuple):
    """A launched step: done at `end_s` (0: at once)."""

    end_s: float
    results: list[ItemResult]


class NullRunner:
    """Implements `plan.Runner`. A step takes `step_s` at least, asleep."""

    def __init__(self, config: EngineConfig, vocab_size: int = 0, depth: int = 0) -> None:
        self.depth = depth
        self.num_blocks = config.num_kv_blocks or DEFAULT_BLOCKS
        self.block_size = config.block_size
        self.vocab_size = vocab_size or DEFAULT_VOCAB
        self.context_cost = 0.0
        self.facts = {"dtype": "none", "device": "null", "architecture": "null"}
        self._script = Script.parse(config.null_script)
        self._step_s = config.null_step_s
        self._sampled: dict[int, list[int]] = {}      # rid -> ids sampled here that the sequence may not show yet

    def admit(self, seq: Sequence) -> None:
        if seq.embeds is not None:
            raise unsupported("prompt_embeds")        # there is no model that could read them
        self._sampled[seq.rid] = []

    def release(self, seq: Sequence) -> None:
        self._sampled.pop(seq.rid, None)

    def launch(self, plan: StepPlan) -> object:
        end = time.monotonic() + self._step_s if self._step_s else 0.0
        return _Step(end, [self._item(item.seq, item.start, item.count, item.sample, item.prompt_logprobs)
                           for item in plan.items])

    def collect(self, handle: object) -> list[ItemResult]:
        assert isinstance(handle, _Step)
        if handle.end_s:
            time.sleep(max(0.0, handle.end_s - time.monotonic()))
        return handle.results

    def ids(self, seq: Sequence, end: int) -> Ids[int]:
        """The first `end` ids of `seq`, those that only this runner knows included."""
        missing = end - len(seq.tokens)
        if missing <= 0:
            return seq.tokens if missing == 0 else seq.tokens[:end]
        return [*seq.tokens, *self._sampled[seq.rid][-missing:]]

    def _item(self, seq: Sequence, start: int, count: int, sample: bool, score: bool) -> ItemResult:
        result = ItemResult()
        if sample:
            result.token = self._script.next_id(seq, self.ids(seq, start + count), self.vocab_size)
            if seq.constraint is not None:
                result.token = constrained(seq, result.token, self.vocab_size)
            sampled = self._sampled[seq.rid]
            sampled.append(result.token)
            del sampled[:-self.depth - 2]             # no more can be in flight
            if seq.sampling.beam is not None:
                result.candidates = _candidates(result.token, 2 * seq.sampling.beam.width, self.vocab_size)
            if seq.sampling.logprobs is not None:
                result.logprobs = _logprobs([result.token], seq.sampling.logprobs, self.vocab_size)
        if score:
            scored = seq.tokens[start + 1:min(start + count + 1, seq.num_prompt)]
            result.prompt_logprobs = _logprobs(scored, seq.sampling.prompt_logprobs or 0, self.vocab_size)
        return result


def constrained(seq: Sequence, token: int, vocab_size: int) -> int:
    """`token` where the grammar of `seq` allows it, else one that it allows, chosen by `token` alone."""
    rule = seq.constraint
    assert rule is not None
    unwelcome = rule.unwelcome(seq.sampling, seq.stops, seq.num_output)
    allowed = rule.allowed(vocab_size, unwelcome) if rule.rules else np.setdiff1d(np.arange(vocab_size), list(unwelcome))
    return token if token in allowed or not len(allowed) else int(allowed[token % len(allowed)])


def _hang() -> NoReturn:
    """What a loop looks like that has work and never turns again."""
    while True:
        time.sleep(1.0)


def _candidates(token: int, count: int, vocab_size: int) -> Candidates:
    """The id and those that follow it by number, each half as likely as the one before."""
    ids = (token + np.arange(min(count, vocab_size))) % vocab_size
    scores = -np.log(2.0) * np.arange(1, len(ids) + 1, dtype=np.float32)
    return Candidates(ids, scores, scores)


def _logprobs(ids: Ids[int], k: int, vocab_size: int) -> Logprobs:
    """Plausible constants: each id is the best with probability one half, the next ids share the rest."""
    n = len(ids)
    values = np.full((n, k), -np.log(2.0), np.float32) - np.arange(k, dtype=np.float32)
    top = (np.asarray(ids, np.uint32)[:, None] + np.arange(k, dtype=np.uint32)) % np.uint32(vocab_size)
    return Logprobs(
        k=k, values=np.full(n, -np.log(2.0), np.float32).tobytes(), ranks=np.ones(n, np.uint32).tobytes(),
        top_ids=top.astype(np.uint32).tobytes(), top_values=values.tobytes())
