"""Runs speech steps: encodes windows into slots, decodes packed rows, applies the rules, chooses tokens.

Implements `plan.Runner` for the scheduler, and `encode` and `align` beside it. Engine process, one thread. A slot is
taken by `encode` and free again after `let_go`; sampler slots live between `admit` and `release`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from engine_proc.batch import BatchBuilder, StepBatch
from engine_proc.device import Device
from engine_proc.plan import ItemResult, StepPlan
from engine_proc.request import Sequence
from engine_proc.slots import Slots
from engine_proc.speech import sampling
from engine_proc.speech.align import Alignment, path_times
from engine_proc.speech.net import SpeechBatch, SpeechNet
from engine_proc.speech.request import Take, Window
from engine_proc.speech.rules import Rules
from engine_proc.speech.vocabulary import Vocabulary
from pipeline.config import EngineConfig


@dataclass(slots=True)
class Launched:
    """A step that has been computed."""

    plan: StepPlan
    sampled: list[int]                  # numbers of the items that got a token
    tokens: list[int]
    logprobs: list[float]
    no_speech: dict[int, float]         # item -> probability


class SpeechRunner:
    """A speech model with its slots. `num_blocks` and `block_size` are those of the decoder's self-attention."""

    depth = 0

    def __init__(self, net: SpeechNet, vocabulary: Vocabulary, device: Device, config: EngineConfig, num_blocks: int,
                 num_slots: int, frames_per_second: float, facts: dict[str, Any]) -> None:
        self.net, self.vocabulary, self.facts = net, vocabulary, facts
        self.num_blocks, self.block_size, self.vocab_size = num_blocks, config.block_size, net.vocab_size
        self.context_cost = 0.0             # its prompts are a handful of tokens
        self.num_slots, self.frames_per_second = num_slots, frames_per_second
        self._free = list(range(num_slots - 1, -1, -1))
        self._rules = Rules(vocabulary)
        self.slots = Slots(config.max_num_seqs, net.vocab_size, vocabulary.max_length + 1, device.torch_device)
        self._builder = BatchBuilder(device, config.block_size, config.max_step_tokens, config.max_num_seqs,
                                     -(-vocabulary.max_length // config.block_size))

    # ---- slots ---------------------------------------------------------------------------------------------------

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_lanes(self) -> int:
        """How many windows `encode` takes at once."""
        return self.net.num_lanes

    @torch.inference_mode()
    def encode(self, windows: list[Window]) -> None:
        """Give each window a slot and compute what the decoder hears."""
        for window in windows:
            assert window.audio < 0 and window.features is not None
            window.audio = self._free.pop()
        self.net.encode([window.audio for window in windows],
                        [window.features for window in windows if window.features is not None])

    def let_go(self, window: Window) -> None:
        """Take the slot back; idempotent."""
        if window.audio >= 0:
            self._free.append(window.audio)
            window.audio = -1

    def admit(self, seq: Sequence) -> None:
        self.slots.admit(seq)

    def release(self, seq: Sequence) -> None:
        self.slots.release(seq)

    # ---- steps ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Launched:
        batch = self._builder.build(plan)
        takes = [cast(Take, item.seq) for item in plan.items]
        heard = [(number, int(batch.model.attention.host_query_start[number]) + take.sot - item.start)
                 for number, (item, take) in enumerate(zip(plan.items, takes, strict=True))
                 if take.no_speech < 0 and item.start <= take.sot < item.start + item.count]
        if heard:
            extra = torch.tensor([row for _, row in heard], dtype=batch.model.rows.dtype)
            batch.model.rows = torch.cat([batch.model.rows, extra])
        audio = torch.tensor([take.window.audio if take.window else 0 for take in takes], dtype=torch.int32)
        hidden = self.net.forward(SpeechBatch(model=batch.model, slots=audio))
        logits = self.net.logits(hidden)
        count = len(batch.sampled)
        no_speech = {}
        if heard:
            column = torch.softmax(logits[count:], dim=-1)[:, self.vocabulary.no_speech]
            no_speech = dict(zip((number for number, _ in heard), column.tolist(), strict=True))
        tokens, logprobs = self._choose(logits[:count], takes, batch) if count else ([], [])
        return Launched(plan, batch.sampled, tokens, logprobs, no_speech)

    def _choose(self, logits: torch.Tensor, takes: list[Take], batch: StepBatch) -> tuple[list[int], list[float]]:
        self._rules.apply(logits, [takes[number] for number in batch.sampled])
        tokens, logprobs = sampling.choose(logits, self.slots.gather(batch.slots, batch.position), self.slots,
                                           self.net.argmax)
        return tokens.tolist(), logprobs.tolist()

    def collect(self, handle: object) -> list[ItemResult]:
        assert isinstance(handle, Launched)
        results = [ItemResult() for _ in handle.plan.items]
        for number, value in handle.no_speech.items():
            cast(Take, handle.plan.items[number].seq).no_speech = value
        for number, token, logprob in zip(handle.sampled, handle.tokens, handle.logprobs, strict=True):
            if np.isfinite(logprob):
                results[number].token = token
                cast(Take, handle.plan.items[number].seq).logprobs.append(logprob)
            else:
                results[number].error = "numerical_error"
        return results

    # ---- word times ----------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def align(self, window: Window, prompt: list[int], text: list[int], seconds: float) -> Alignment:
        """When each of the `text` ids is said: see align.py. `prompt` ends where the text begins."""
        frames = min(max(1, round(seconds * self.frames_per_second)), round(30 * self.frames_per_second))
        weights = self.net.attention_weights(window.audio, [*prompt, *text, self.vocabulary.eot],
                                             list(self.vocabulary.alignment_heads), frames)
        return path_times(weights.numpy(), len(prompt), len(text), self.frames_per_second)
