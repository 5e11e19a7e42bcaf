"""One sequence's grammar, followed token by token: which ids may come next, and when nothing may.

Engine process, no torch. Made by `engine_proc.grammars`, owned by its Sequence, advanced where a step is collected, read
where the next one is launched. A pure function of the output ids, so that it survives pre-emption and is made again from
the history after a death. What goes wrong stays in `error`: it ends its own request and nothing else.
"""
from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from pipeline.errors import QuartetError
from pipeline.params import SamplingParams

BURST_NS = 400_000_000           # processor time for masks that a sequence may use at once
STEP_NS = 4_000_000              # and what each step adds to it
NONE: frozenset[int] = frozenset()


def failure(message: str, param: str | None) -> QuartetError:
    return QuartetError("invalid_value", message, param)


class Vocabulary:
    """What constraints know of a model's tokens: the tokenizer of `llguidance`, and the ids that end a sequence."""

    __slots__ = ("tokenizer", "ends", "words")

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.ends = frozenset(tokenizer.eos_tokens)
        self.words = -(-tokenizer.vocab_size // 32)       # of a mask: int32 each

    def text(self, token: int) -> bytes:
        return bytes(self.tokenizer.decode_bytes([token]))


class Constraint:
    """`active`: the grammar rules; before that, `after` has to be generated. `complete`: nothing may follow.

    `words`: of its masks, int32 each.
    """

    __slots__ = ("active", "complete", "error", "ends", "_vocabulary", "_matcher", "_after", "_after_ids", "_tail",
                 "_last", "_budget_ns", "_param", "words")

    def __init__(self, vocabulary: Vocabulary, matcher: Any, after: str, after_ids: Iterable[int],
                 param: str | None) -> None:
        self._vocabulary, self._matcher, self._param = vocabulary, matcher, param
        self.ends = vocabulary.ends
        self._after, self._after_ids = after.encode(), list(after_ids)
        self._tail, self._last = b"", list[int]()         # the newest text and ids, while the grammar does not rule
        self.active = not self._after and not self._after_ids
        self.complete = False
        self.error: QuartetError | None = None
        self._budget_ns = BURST_NS
        self.words = vocabulary.words

    @property
    def rules(self) -> bool:
        """Whether the grammar decides about the next token."""
        return self.active and self.error is None

    def unwelcome(self, sampling: SamplingParams, stops: frozenset[int], num_output: int) -> frozenset[int]:
        """Ids of the output's end while it is not to end (min_tokens, ignore_eos, not begun)."""
        if num_output < sampling.min_tokens:
            return self.ends | stops
        return self.ends if sampling.ignore_eos or not self.active else NONE

    def advance(self, token: int) -> QuartetError | None:
        """`token` was appended to the output; what is wrong, if anything."""
        if self.error is not None or self.complete:
            return self.error
        if not self.active:
            self._look_for_after(token)
        elif not self._matcher.consume_token(token):
            self._fail("became too complex to follow")
        else:
            self.complete = self._matcher.is_stopped()
        return self.error

    def allow(self, bits: np.ndarray, vocab: int, avoid: frozenset[int]) -> None:
        """Fill `bits`, int32 [words], with which of the ids below `vocab` may come next. None may where `error` is set.

        `avoid`: ids that are only allowed where nothing else is (ends, while the request wants more).
        """
        started = time.thread_time_ns()
        try:
            self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        except ValueError:                                # its limits: too many states, too much work in one step
            return self._fail("became too complex to follow", bits)
        self._budget_ns = min(BURST_NS, self._budget_ns + STEP_NS) - (time.thread_time_ns() - started)
        if self._budget_ns < 0:
            return self._fail("takes too long to follow", bits)
        unsigned = bits.view(np.uint32)
        unsigned[-(-vocab // 32):] = 0
        if vocab % 32:
            unsigned[vocab // 32] &= np.uint32((1 << vocab % 32) - 1)
        if avoid:
            kept = unsigned.copy()
            for id_ in (each for each in avoid if each < vocab):
                unsigned[id_ // 32] &= np.uint32(~(1 << id_ % 32) & 0xFFFFFFFF)
            if not _any(unsigned):
                unsigned[:] = kept
        return None if _any(unsigned) else self._fail("leaves nothing that this model could say", bits)

    def allowed(self, vocab: int, avoid: frozenset[int] = NONE) -> np.ndarray:
        """`allow` as ids in order, int64."""
        bits = np.empty(self.words, np.int32)
        self.allow(bits, vocab, avoid)
        return np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))

    def _fail(self, what: str, bits: np.ndarray | None = None) -> None:
        self.error = failure(f"The grammar of this request {what}.", self._param)
        if bits is not None:
            bits[:] = 0

    def _look_for_after(self, token: int) -> None:
        """The tag may come as the very ids, or as other ids with the same text."""
        if self._after_ids:
            self._last = [*self._last, token][-len(self._after_ids):]
        if self._after:
            text = self._tail + self._vocabulary.text(token)
            self.active = self._after in text
            self._tail = text[-len(self._after):]
        if self._after_ids and self._last == self._after_ids:
            self.active = True
        if self.active:
            self._tail, self._last = b"", []


def _any(bits: np.ndarray) -> bool:
    """Whether any is set: a comparison of bytes, ten times as fast as NumPy's reduction of a few thousand."""
    return bits.tobytes() != bytes(bits.nbytes)
