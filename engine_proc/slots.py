"""Sampling parameters and penalty counts of the running sequences, as arrays with one row per slot.

The runner fills a row on admission (replaying the sequence's tokens) and frees it on release; the sampler gathers rows
by index. Counts over the vocabulary exist only for sequences that ask for penalties. Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine_proc.bans import Allowed, Words
from engine_proc.history import Histories
from engine_proc.masks import Masks
from engine_proc.request import Sequence
from engine_proc.thinking import Budgets
from pipeline.errors import invalid
from pipeline.messages import unpack_ids

OFF = -1
# Rows of `Slots._ints`.
TOP_K, LOGPROBS, PENALTY, HISTORY, ALLOWED, THINKING, BEAM = range(7)


@dataclass(slots=True)
class Rows:
    """The parameters of R rows of logits, gathered for one step. NumPy arrays [R] unless said otherwise."""

    temperature: np.ndarray             # float32; 0: greedy
    top_k: np.ndarray                   # int64; 0: off
    top_p: np.ndarray                   # float64
    min_p: np.ndarray                   # float32
    seed: np.ndarray                    # uint64
    choice: np.ndarray                  # uint64
    logprobs: np.ndarray                # int64; OFF: none are wanted
    position: np.ndarray                # int64: index of the row's next token among the output
    penalty: np.ndarray                 # int64: row of the count tables; OFF: no penalties
    presence: np.ndarray                # float32
    frequency: np.ndarray               # float32
    repetition: np.ndarray              # float32
    history: np.ndarray                 # int64: row of the histories; OFF: not needed
    allowed: np.ndarray                 # int64: row of the tables of allowed ids; OFF: everything is allowed
    thinking: np.ndarray                # int64: row of the thinking budgets; OFF: no bound
    beam: np.ndarray                    # int64: candidates that beam search wants; 0: the row is sampled
    bias: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)    # (row, ids, values)
    banned: list[tuple[int, np.ndarray]] = field(default_factory=list)              # (row, ids): min_tokens
    words: list[tuple[int, int, Words]] = field(default_factory=list)               # (row, row of histories, words)
    extra: list[tuple[int, np.ndarray]] = field(default_factory=list)               # (row, ids): logprob_token_ids
    masks: Masks | None = None          # of the rows whose grammars rule
    simple: bool = False                # no row asks for anything but its best token: `plain` without looking

    @property
    def forbidding(self) -> bool:
        """Whether parameters change or forbid tokens of some row."""
        return bool(self.banned or self.words or self.bias or (self.allowed >= 0).any())

    @property
    def banning(self) -> bool:
        """Whether some row may be left without any token."""
        return self.forbidding or self.masks is not None

    @property
    def plain(self) -> bool:
        """Whether the best token is all that is wanted of every row, once grammars have had their say."""
        return self.simple or not (
            self.forbidding or self.extra or (self.logprobs >= 0).any() or (self.temperature > 0).any()
            or (self.history >= 0).any() or (self.thinking >= 0).any() or self.beam.any())


class Slots:
    """One row per running sequence. `vocab` is the width of the logits, `longest` the most tokens of a sequence."""

    def __init__(self, count: int, vocab: int, longest: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self._free = list(range(count - 1, -1, -1))
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._ends: dict[int, np.ndarray] = {}          # slot -> ids that end it; only where min_tokens is set
        self._words: dict[int, Words] = {}              # slot -> bad words of several ids
        self._extra: dict[int, np.ndarray] = {}         # slot -> logprob_token_ids
        self._floats = np.zeros((5, count), np.float32)     # temperature, min_p, presence, frequency, repetition
        self._top_p = np.ones(count, np.float64)
        self._ints = np.zeros((7, count), np.int64)
        self._keys = np.zeros((2, count), np.uint64)        # seed, choice
        self._min_tokens = np.zeros(count, np.int64)
        self._special = np.zeros(count, bool)           # slots that ask for more than the best token
        self.histories, self.allowed, self.thinking = Histories(longest, device), Allowed(vocab, device), Budgets(device)
        self.latest = torch.zeros(count, dtype=torch.int64, device=device)      # tokens that steps in flight sample
        self._free_counts: list[int] = []
        self.counts = torch.zeros((0, vocab), dtype=torch.int32, device=device)       # [P, V]: among the output

    def admit(self, seq: Sequence) -> None:
        """Give `seq` a slot. QuartetError for ids outside of the vocabulary, before anything is taken."""
        params = seq.sampling
        bias_ids, allowed, extra = (_ids(data) for data in (params.bias_ids, params.allowed_ids, params.logprob_ids))
        bad = [_ids(data) for data in params.bad_ids if data]
        for ids, param in ((bias_ids, "logit_bias"), (allowed, "allowed_token_ids"), (extra, "logprob_token_ids"),
                           *((word, "bad_words") for word in bad), (np.asarray(seq.tokens), "prompt")):
            if len(ids) and int(ids.max()) >= self.vocab:
                raise invalid(f"Token id {int(ids.max())} is outside of the vocabulary.", param)
        if not self._free:
            self._grow()
        slot = seq.slot = self._free.pop()
        self._floats[:, slot] = (
            0.0 if params.greedy or params.beam else params.temperature, params.min_p, params.presence_penalty,
            params.frequency_penalty, params.repetition_penalty)
        self._top_p[slot] = params.top_p
        words = Words.of([word for word in bad if len(word) > 1])
        looks_back = params.penalised or words is not None
        ends = [id_ for id_ in seq.stops | set(unpack_ids(params.stop_ids)) if id_ < self.vocab]
        self._ints[:, slot] = (
            max(params.top_k, 0), OFF if params.logprobs is None else params.logprobs,
            self._take_counts(seq) if params.penalised else OFF, self.histories.take(seq) if looks_back else OFF,
            self.allowed.take(allowed) if len(allowed) else OFF,
            self.thinking.take(seq) if params.thinking is not None else OFF,
            0 if params.beam is None else min(self.vocab, params.beam.width * max(2, 1 + len(ends))))
        self._keys[:, slot] = params.seed, seq.choice
        self._min_tokens[slot] = params.min_tokens
        never = np.array([word[0] for word in bad if len(word) == 1], np.int64)
        if len(bias_ids) or len(never):
            values = np.frombuffer(params.bias_values, np.float32)
            self._bias[slot] = (np.concatenate([bias_ids, never]),
                                np.concatenate([values, np.full(len(never), -np.inf, np.float32)]))
        if words is not None:
            self._words[slot] = words
        if len(extra) and params.logprobs is not None:
            self._extra[slot] = extra
        if params.min_tokens and ends:
            self._ends[slot] = np.array(ends, np.int64)
        ints = self._ints[:, slot]
        self._special[slot] = (self._floats[0, slot] > 0 or (ints[[LOGPROBS, HISTORY, ALLOWED, THINKING]] != OFF).any()
                               or ints[BEAM] or any(slot in table for table in (self._bias, self._words, self._extra,
                                                                                self._ends)))

    def release(self, seq: Sequence) -> None:
        """Take the slot back; idempotent."""
        slot, seq.slot = seq.slot, -1
        if slot < 0:
            return
        for kind, free in ((PENALTY, self._free_counts), (HISTORY, self.histories.free), (ALLOWED, self.allowed.free),
                           (THINKING, self.thinking.free)):
            if self._ints[kind, slot] != OFF:
                free.append(int(self._ints[kind, slot]))
        for table in (self._bias, self._ends, self._words, self._extra):
            table.pop(slot, None)
        self._free.append(slot)

    def plain(self, slot: int) -> bool:
        """Whether the sequence in `slot` asks for nothing but its best token."""
        return not self._special[slot]

    def gather(self, slots: np.ndarray, position: np.ndarray) -> Rows:
        """The parameters of rows whose sequences sit in `slots`, int64 [R]."""
        floats, ints, keys = self._floats[:, slots], self._ints[:, slots], self._keys[:, slots]
        rows = Rows(
            temperature=floats[0], min_p=floats[1], presence=floats[2], frequency=floats[3], repetition=floats[4],
            top_p=self._top_p[slots], top_k=ints[TOP_K], logprobs=ints[LOGPROBS], penalty=ints[PENALTY], seed=keys[0],
            choice=keys[1], position=position, history=ints[HISTORY], allowed=ints[ALLOWED], thinking=ints[THINKING],
            beam=ints[BEAM], simple=not self._special[slots].any())
        if rows.simple:
            return rows
        if self._bias or self._words or self._extra:
            for row, slot in enumerate(slots.tolist()):
                if slot in self._bias:
                    rows.bias.append((row, *self._bias[slot]))
                if slot in self._words:
                    rows.words.append((row, int(rows.history[row]), self._words[slot]))
                if slot in self._extra:
                    rows.extra.append((row, self._extra[slot]))
        if self._ends:
            held = np.flatnonzero(position < self._min_tokens[slots]).tolist()
            rows.banned = [(row, self._ends[slot]) for row in held if (slot := int(slots[row])) in self._ends]
        return rows

    def note(self, rows: Rows, tokens: torch.Tensor) -> None:
        """The sampled tokens, int64 [R], go into what is kept of the rows that look back."""
        which = np.flatnonzero(rows.history >= 0)
        if not len(which):
            return
        self.histories.push(rows.history[which], tokens[self._on_device(which)])
        counted = np.flatnonzero(rows.penalty >= 0)
        if len(counted):
            self.counts[self._on_device(rows.penalty[counted]), tokens[self._on_device(counted)]] += 1

    def _take_counts(self, seq: Sequence) -> int:
        if not self._free_counts:
            old, more = len(self.counts), max(4, len(self.counts))
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more, self.vocab)])
            self._free_counts = list(range(old + more - 1, old - 1, -1))
        row = self._free_counts.pop()
        output = torch.tensor(seq.tokens[seq.num_prompt:], dtype=torch.int64, device=self.device)
        self.counts[row] = torch.bincount(output, minlength=self.vocab)
        return row

    def _on_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)

    def _grow(self) -> None:
        """Twice the slots; happens when more sequences are admitted than the configuration runs at once."""
        old = len(self._top_p)
        self._floats, self._ints, self._keys = (
            np.concatenate([table, np.zeros_like(table)], axis=1) for table in (self._floats, self._ints, self._keys))
        self._top_p, self._min_tokens, self._special = (
            np.concatenate([table, np.zeros_like(table)]) for table in (self._top_p, self._min_tokens, self._special))
        self._free = list(range(2 * old - 1, old - 1, -1))
        self.latest = torch.cat([self.latest, torch.zeros_like(self.latest)])

    def assert_invariants(self, running: list[Sequence]) -> None:
        """`running`: every sequence that was admitted and not released."""
        held = [seq.slot for seq in running]
        assert len(set(held)) == len(held) and not set(held) & set(self._free)
        assert len(held) + len(self._free) == len(self._top_p)
        for table in (self._bias, self._ends, self._words, self._extra):
            assert set(table) <= set(held)
        for kind, free, size in ((PENALTY, self._free_counts, len(self.counts)),
                                 (HISTORY, self.histories.free, len(self.histories)),
                                 (ALLOWED, self.allowed.free, len(self.allowed)),
                                 (THINKING, self.thinking.free, len(self.thinking))):
            taken = [int(row) for row in self._ints[kind, held] if row != OFF]
            assert sorted([*taken, *free]) == list(range(size))


def _ids(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint32).astype(np.int64)
