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
from tokenizer_proc.joined import joined
from tokenizer_proc.load import PARTIAL_CHARS, RESYNC, TextModel
from tokenizer_proc.pool_errors import invalid_input, renamed, too_long
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
        self._cuts, self._longest = submit.truncate is not None, submit.longest
        truncate = self._limit if submit.truncate is None or submit.truncate < 0 else submit.truncate
        self._keep = min(truncate, self._limit)

    def encode(self, texts: Sequence[PoolText]) -> Iterator[PoolInput]:
        """The inputs, in order."""
        plain = [(t.index, s) for t in texts if t.chat is None for s in (t.text, t.pair) if s is not None]
        encoded = iter(self._batch(plain))
        for text in texts:
            if text.text is None:
                yield self._other(text)
                continue
            if text.chat is not None:
                yield joined(text, self._model, self._keep, self._cuts, self._submit.truncate_left)
                continue
            first = self._head(next(encoded), text.keep)
            if text.pair is None:
                yield self._single(text.index, first, self._lead(text))
            else:
                yield self._pair(text.index, first, self._head(next(encoded), text.keep_pair))

    def _batch(self, texts: Sequence[tuple[int, str]]) -> list[Sequence[int]]:
        """Ids of each text, without special tokens; long ones are encoded in part where that is enough."""
        for index, text in texts:
            try:
                text.encode()
            except UnicodeEncodeError:
                raise invalid_input(index, "holds an unpaired surrogate, which is no character") from None
        short = [text for _, text in texts if len(text) <= PARTIAL_CHARS]
        with self._maker.encode_timer():
            done = iter(self._model.tokenizer.encode_batch_fast(short, add_special_tokens=False) if short else ())
            return [next(done).ids if len(text) <= PARTIAL_CHARS else self._long(index, text) for index, text in texts]

    def _long(self, index: int, text: str) -> Sequence[int]:
        """Ids of a long text: as many from its kept end as can matter, or the error that it is too long."""
        if not self._cuts:
            fits = len(text) <= self._longest * self._model.chars_per_token
            try:
                return self._model.encode([(text, False)], False, unlimited=fits)
            except QuartetError as error:
                raise renamed(error, index) from None
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
            return self._finish(index, self._cut(index, ids, self._keep, self._longest), room=self._limit)
        try:
            long = self._cuts or self._longest > 0
            pieces = self._maker.pieces(model, text.chat, None, long)
            ids = model.encode(self._bounded(pieces) if long else pieces, False, unlimited=long)
        except QuartetError as error:
            raise (renamed(error, index) if error.code == "context_length_exceeded" else error) from None
        return self._single(index, ids)

    def _bounded(self, pieces: Sequence[Piece]) -> list[Piece]:
        """As much of a chat's kept end as its ids can come from."""
        left, kept = self._submit.truncate_left, list[Piece]()
        room = max(self._model.max_prompt_chars, (self._longest + 1) * self._model.chars_per_token)
        for text, plain in reversed(pieces) if left else pieces:
            part = text[max(0, len(text) - room):] if left else text[:room]
            room -= len(part)
            kept.append((part, plain))
        return kept[::-1] if left else kept

    def _lead(self, text: PoolText) -> int:
        """Ids of the prompt at the beginning of a text, when they are not to be pooled."""
        if not text.lead:
            return 0
        prompt, special = (text.text or "")[:text.lead], self._submit.add_special
        return len(self._model.encode([(prompt, False)], False)) + (len(self._model.before) if special else 0)

    def _single(self, index: int, ids: Sequence[int], lead: int = 0) -> PoolInput:
        before, after = self._model.specials if self._submit.add_special else ([], [])
        special = len(before) + len(after)
        kept = self._cut(index, ids, self._keep - special, 0 if lead else self._longest, special)
        room = self._limit - special
        if len(kept) <= room:
            made = self._finish(index, [*before, *kept, *after])
            made.skip = min(lead, len(made.ids) // 4 - 1)
            return made
        parts = [[*before, *kept[start:start + room], *after] for start in range(0, len(kept), room)]
        return PoolInput(index, pack_ids(id for part in parts for id in part), parts=pack_ids(map(len, parts)))

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

    def _finish(self, index: int, ids: Sequence[int], types: bytes = b"", room: int = 0) -> PoolInput:
        """`room`: what is longer comes in parts."""
        count = len(ids)
        if not count:
            raise invalid_input(index, "is empty: it has no token")
        parts = [min(room, count - start) for start in range(0, count, room)] if 0 < room < count else []
        return PoolInput(index, pack_ids(ids), types, parts=pack_ids(parts))

    def _cut(self, index: int, ids: Sequence[int], room: int, longest: int, special: int = 0) -> Sequence[int]:
        """`ids`, cut to `room` where the request wants that; `longest`: tokens of an input that comes in parts."""
        if len(ids) <= room:
            return ids
        if self._cuts:
            return self._head(ids, room, True)
        count = len(ids) + special * (-(-len(ids) // max(1, self._limit - special)) if longest else 1)
        if count > longest:
            raise self._too_long(index, count)
        return ids

    def _head(self, ids: Sequence[int], keep: int, zero_counts: bool = False) -> Sequence[int]:
        """`keep` ids of the end that is kept; 0 means all unless `zero_counts`."""
        if len(ids) <= keep or (keep <= 0 and not zero_counts):
            return ids
        return ids[len(ids) - max(0, keep):] if self._submit.truncate_left else ids[:max(0, keep)]

    def _too_long(self, index: int, count: int) -> QuartetError:
        return too_long(index, count, self._longest or self._limit)


def _share(first: int, second: int, room: int) -> tuple[int, int]:
    """Lengths of two texts that together have `room`: the longer one is cut first, as transformers' longest_first."""
    room = max(0, room)
    shorter = min(first, second)
    if 2 * shorter > room:
        shorter = room // 2
    longer = room - shorter
    return (shorter, longer) if first <= second else (longer, shorter)
