"""Incremental decoding of one choice: ids in, text out, append-only, one id at a time.

Run by the detokenizer. The text is a pure function of the id sequence, never of how the ids were grouped, and costs a
constant per id whatever the ids are. Bytes that may still become a character are withheld (at most three), and invalid
ones become U+FFFD by the WHATWG rule, as soon as they are known to be invalid. Where a SentencePiece-style decoder
would turn a finished character back into U+FFFD because of a byte that follows it, our text stays: no stream can
retract what it has sent.
"""
from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence
from typing import Protocol

from detok_proc.vocab import Vocab

WITHHOLD = 8                        # ids after which the library's text is committed even when it ends in U+FFFD
PRIMING = 8                         # prompt ids that can still matter for the first generated character


class Text(Protocol):
    """The decoder of one choice."""

    def push(self, number: int) -> str:
        """The text that this id completes; may be empty."""

    def push_all(self, ids: Sequence[int]) -> str:
        """The same as pushing one after the other."""

    def end(self) -> str:
        """What was withheld, when no id follows."""


class ByteText:
    """By byte table."""

    __slots__ = ("_table", "_size", "_tail")

    def __init__(self, table: list[bytes], tail: bytes = b"") -> None:
        self._table, self._size, self._tail = table, len(table), tail

    def push(self, number: int) -> str:
        data = self._table[number] if number < self._size else b""
        if self._tail:
            data = self._tail + data
        text, used = utf_8_decode(data, "replace", False)
        self._tail = b"" if used == len(data) else data[used:]
        return text

    def push_all(self, ids: Sequence[int]) -> str:
        table, size = self._table, self._size
        data = self._tail + b"".join([table[number] for number in ids if number < size])
        text, used = utf_8_decode(data, "replace", False)
        self._tail = data[used:]
        return text

    def end(self) -> str:
        text, self._tail = self._tail.decode("utf-8", "replace"), b""
        return text


class TightText(ByteText):
    """By byte table, without the space that a joining decoder puts between two added tokens."""

    __slots__ = ("_added", "_last")

    def __init__(self, table: list[bytes], added: frozenset[int], last: int | None, tail: bytes = b"") -> None:
        super().__init__(table, tail)
        self._added, self._last = added, last

    def push(self, number: int) -> str:
        text = super().push(number)
        if number in self._added and self._last in self._added:
            text = text.removeprefix(" ")
        self._last = number
        return text

    def push_all(self, ids: Sequence[int]) -> str:
        return "".join([self.push(number) for number in ids])


class LibraryText:
    """By the tokenizer library, for decoders that look across tokens.

    Each id costs two decodes of a window of at most 2 * WITHHOLD ids: what is committed is what the window's text gains
    over the text of its committed half. A text that ends in U+FFFD waits for the next id, but not for ever.
    """

    __slots__ = ("_vocab", "_skip", "_window", "_committed")

    def __init__(self, vocab: Vocab, skip_special: bool, before: Sequence[int]) -> None:
        self._vocab, self._skip = vocab, skip_special
        self._window = list(before)[-WITHHOLD:]
        self._committed = len(self._window)

    def push(self, number: int) -> str:
        self._window.append(number)
        text = self._gain()
        waiting = len(self._window) - self._committed
        if waiting < WITHHOLD and (not text or text.endswith("\ufffd")):
            return ""
        del self._window[:self._committed]
        self._committed = len(self._window)
        return text

    def push_all(self, ids: Sequence[int]) -> str:
        return "".join([self.push(number) for number in ids])

    def end(self) -> str:
        text = self._gain()
        self._committed = len(self._window)
        return text

    def _gain(self) -> str:
        decode = self._vocab.tokenizer.decode
        before = decode(self._window[:self._committed], skip_special_tokens=self._skip)
        return decode(self._window, skip_special_tokens=self._skip)[len(before):]


class MarkedText:
    """By the library, without special tokens but for some, which are markers of a parser."""

    __slots__ = ("_inner", "_names", "_special")

    def __init__(self, vocab: Vocab, inner: LibraryText, markers: frozenset[int]) -> None:
        self._inner, self._special = inner, vocab.special
        self._names = {number: vocab.tokenizer.id_to_token(number) or "" for number in markers}

    def push(self, number: int) -> str:
        if number not in self._special:
            return self._inner.push(number)
        return self._inner.end() + self._names.get(number, "")

    def push_all(self, ids: Sequence[int]) -> str:
        return "".join([self.push(number) for number in ids])

    def end(self) -> str:
        return self._inner.end()


def open_text(vocab: Vocab, left: Sequence[int], *, skip_special: bool, spaces: bool,
              markers: frozenset[str] = frozenset()) -> Text:
    """The decoder of a choice whose prompt ends with `left`. `markers`: special tokens that are shown in any case.

    What is generated continues the prompt: its first piece keeps its leading space, and its first bytes may complete a
    character that the prompt began. `spaces`: keep the spaces of a joining decoder between special tokens.
    """
    if not vocab.exact:
        text = LibraryText(vocab, skip_special, left)
        return MarkedText(vocab, text, vocab.markers(markers)) if markers and skip_special else text
    table = vocab.marked(markers) if skip_special else vocab.raw
    data = b"".join([table[number] for number in left[-PRIMING:] if number < len(table)])
    tail = data[utf_8_decode(data, "replace", False)[1]:]
    assert vocab.rules is not None
    if vocab.rules.joined and not skip_special and not spaces:
        return TightText(table, vocab.added, left[-1] if len(left) else None, tail)
    return ByteText(table, tail)


def whole_text(vocab: Vocab, ids: Sequence[int], *, skip_special: bool) -> str:
    """The text of a whole prompt, for echo; a character that its last bytes only begin is left to what follows."""
    if not vocab.exact:
        return str(vocab.tokenizer.decode(list(ids), skip_special_tokens=skip_special))
    return utf_8_decode(vocab.whole(ids, skip_special), "replace", False)[0]
