"""Inputs of a pooling request -> token ids, or the error that its caller is to see.

Run by the tokenizer, in slices, so that a large request stands in nobody's way. Every input is encoded before the
first one leaves: a request that cannot be served costs the engine nothing. Errors call an input ``input[i]``, which the
frontend turns into the caller's own name for it.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from pipeline.errors import QuartetError
from pipeline.ids import frontend_index
from pipeline.messages import (
    Kind,
    PoolAdd,
    PoolAdds,
    PoolHanded,
    PoolInput,
    PoolText,
    SubmitPool,
    pack_ids,
    unpack_ids,
)
from pipeline.transport import Address
from tokenizer_proc.guard import Piece
from tokenizer_proc.load import PARTIAL_CHARS, RESYNC, TextModel
from tokenizer_proc.prompt import PromptMaker

SLICE_CHARS = 16 * 1024              # what is encoded in one turn of the worker, about ten milliseconds of work
SLICE_INPUTS = 256
MESSAGE_IDS = 64 * 1024              # ids in one message to the engine
Result = tuple[Address, object, int]


@dataclass(slots=True, eq=False)
class PoolWork:
    """A submission that is being encoded."""

    submit: SubmitPool
    inputs: list[PoolInput] = field(default_factory=list)

    @property
    def rid(self) -> int:
        return self.submit.rid

    @property
    def done(self) -> bool:
        return len(self.inputs) == len(self.submit.inputs)

    def advance(self, model: TextModel, maker: PromptMaker) -> None:
        """Encode one slice. QuartetError for the first input that cannot be served."""
        submit = self.submit
        if submit.deadline_ns and time.monotonic_ns() > submit.deadline_ns:
            raise QuartetError("timeout", "The request waited longer than its deadline allows.")
        chars, texts = 0, list[PoolText]()
        for text in submit.inputs[len(self.inputs):len(self.inputs) + SLICE_INPUTS]:
            chars += len(text.text or "") + len(text.pair or "") + (len(text.chat.messages_json) if text.chat else 0)
            if texts and chars > SLICE_CHARS:
                break
            texts.append(text)
        self.inputs.extend(_Slice(submit, model, maker).encode(texts))

    def results(self, tokenizer: int, epoch: int) -> Iterator[Result]:
        """The messages to the engine, and to the frontend that they are on their way."""
        submit, start, size = self.submit, 0, 0
        for end, given in enumerate(self.inputs, 1):
            size += len(given.ids) // 4
            if size >= MESSAGE_IDS or end == len(self.inputs):
                part = self.inputs[start:end]
                add = PoolAdd(submit.rid, submit.route, part, submit.params, submit.deadline_ns, submit.priority,
                              len(self.inputs), submit.alone)
                yield Address(Kind.ENGINE, submit.route.engine), PoolAdds([add]), 5 * size + 40 * len(part)
                start, size = end, 0
        yield Address(Kind.FRONTEND, frontend_index(submit.rid)), PoolHanded(tokenizer, epoch, submit.rid), 100


class _Slice:
    """Encodes some inputs of one submission."""

    def __init__(self, submit: SubmitPool, model: TextModel, maker: PromptMaker) -> None:
        self._submit, self._model, self._maker = submit, model, maker
        self._limit = model.max_model_len
        self._cuts = submit.truncate is not None
        truncate = self._limit if submit.truncate is None or submit.truncate < 0 else submit.truncate
        self._keep = min(truncate, self._limit)

    def encode(self, texts: Sequence[PoolText]) -> Iterator[PoolInput]:
        """The inputs, in order."""
        wanted = {id(t): t for t in texts if t.text is not None}
        plain = [(t.index, s) for t in wanted.values() for s in (t.text, t.pair) if s is not None]
        encoded = iter(self._batch(plain))
        for text in texts:
            if text.text is None:
                yield self._other(text)
                continue
            first = self._head(next(encoded), text.keep)
            if text.pair is None:
                yield self._single(text.index, first)
            else:
                yield self._pair(text.index, first, self._head(next(encoded), text.keep_pair))

    def _batch(self, texts: Sequence[tuple[int, str]]) -> list[Sequence[int]]:
        """Ids of each text, without special tokens; long ones are encoded in part where that is enough."""
        for index, text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise _invalid(index, "holds an unpaired surrogate, which is no character") from None
        short = [text for _, text in texts if len(text) <= PARTIAL_CHARS]
        with self._maker.encode_timer():
            done = iter(self._model.tokenizer.encode_batch_fast(short, add_special_tokens=False) if short else ())
            return [next(done).ids if len(text) <= PARTIAL_CHARS else self._long(index, text) for index, text in texts]

    def _long(self, index: int, text: str) -> Sequence[int]:
        """Ids of a long text: as many from its kept end as can matter, or the error that it is too long."""
        if not self._cuts:
            try:
                return self._model.encode([(text, False)], False)
            except QuartetError as error:
                raise _renamed(error, index) from None
        size = max(PARTIAL_CHARS, 8 * self._keep)
        while True:
            left = self._submit.truncate_left
            part = text[-size:] if left else text[:size]
            ids = self._model.encode([(part, False)], False, unlimited=True)
            if len(part) == len(text) or size >= self._model.max_prompt_chars:
                return ids
            if len(ids) >= self._keep + RESYNC:
                return ids[RESYNC:] if left else ids[:-RESYNC]
            size *= 4

    def _other(self, text: PoolText) -> PoolInput:
        """An input given as ids or as a chat."""
        model, index = self._model, text.index
        if text.chat is None:
            ids = unpack_ids(text.ids)
            model.check_ids(ids, f"input[{index}]")
            return self._finish(index, self._cut(index, ids, self._keep))
        try:
            pieces = self._maker.pieces(model, text.chat, None, self._cuts)
            ids = model.encode(self._bounded(pieces) if self._cuts else pieces, False, unlimited=self._cuts)
        except QuartetError as error:
            raise (_renamed(error, index) if error.code == "context_length_exceeded" else error) from None
        return self._single(index, ids)

    def _bounded(self, pieces: Sequence[Piece]) -> list[Piece]:
        """As much of a chat's kept end as its ids can come from."""
        left, room, kept = self._submit.truncate_left, self._model.max_prompt_chars, list[Piece]()
        for text, plain in reversed(pieces) if left else pieces:
            part = text[max(0, len(text) - room):] if left else text[:room]
            room -= len(part)
            kept.append((part, plain))
        return kept[::-1] if left else kept

    def _single(self, index: int, ids: Sequence[int]) -> PoolInput:
        if not self._submit.add_special:
            return self._finish(index, self._cut(index, ids, self._keep))
        before, after = self._model.specials
        special = len(before) + len(after)
        return self._finish(index, [*before, *self._cut(index, ids, self._keep - special, special), *after])

    def _pair(self, index: int, first: Sequence[int], second: Sequence[int]) -> PoolInput:
        shape = self._model.pair
        room, total = self._keep - shape.num_special, len(first) + len(second)
        if total > room:
            if not self._cuts:
                raise self._too_long(index, total + shape.num_special)
            sizes = _share(len(first), len(second), room)
            first, second = self._head(first, sizes[0], True), self._head(second, sizes[1], True)
        ids, types = shape.join(first, second)
        return self._finish(index, ids, types if self._model.num_type_ids > 1 and any(types) else b"")

    def _finish(self, index: int, ids: Sequence[int], types: bytes = b"") -> PoolInput:
        if not len(ids):
            raise _invalid(index, "is empty: it has no token")
        return PoolInput(index, pack_ids(ids), types)

    def _cut(self, index: int, ids: Sequence[int], room: int, special: int = 0) -> Sequence[int]:
        if len(ids) <= room:
            return ids
        if not self._cuts:
            raise self._too_long(index, len(ids) + special)
        return self._head(ids, room, True)

    def _head(self, ids: Sequence[int], keep: int, zero_counts: bool = False) -> Sequence[int]:
        """`keep` ids of the end that is kept; 0 means all unless `zero_counts`."""
        if len(ids) <= keep or (keep <= 0 and not zero_counts):
            return ids
        return ids[len(ids) - max(0, keep):] if self._submit.truncate_left else ids[:max(0, keep)]

    def _too_long(self, index: int, count: int) -> QuartetError:
        return QuartetError(
            "context_length_exceeded", f"This model takes inputs of at most {self._limit} tokens, but 'input[{index}]' "
            f"has {count}. Shorten it, or set 'truncate_prompt_tokens' to -1.", f"input[{index}]")


def _share(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that together have `room`: the longer one is cut first, as transformers' longest_first."""
    room = max(0, room)
    shorter = min(first, second)
    if 2 * shorter > room:
        shorter = room // 2
    longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)


def _invalid(index: int, what: str) -> QuartetError:
    return QuartetError("invalid_value", f"'input[{index}]' {what}.", f"input[{index}]")


def _renamed(error: QuartetError, index: int) -> QuartetError:
    return QuartetError(error.code, error.message.replace("your prompt", f"'input[{index}]'").replace(
        "the prompt", f"'input[{index}]'").replace("The prompt", f"'input[{index}]'"), f"input[{index}]")

