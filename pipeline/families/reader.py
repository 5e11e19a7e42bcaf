"""The input of a parser: text that arrives in pieces, read by a coroutine that waits where there is none yet.

What a parser has read and may still have to give back as plain content is recorded from a mark on. Everything here
costs time in proportion to the text, however it is cut into pieces. No regular expressions, no recursion.
"""
from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

SPACE = " \t\r\n"
HOLD_SPACE = 16                     # characters of white space that are held back where they may be dropped
T = TypeVar("T")
Steps = Generator[None, None, T]


class Malformed(Exception):
    """What was read is not what the family's format says."""


class Reader:
    """`text[pos:]` is what was fed and not read."""

    __slots__ = ("text", "pos", "ended", "_kept", "_from")

    def __init__(self) -> None:
        self.text, self.pos, self.ended = "", 0, False
        self._kept: list[str] | None = None
        self._from = 0

    # ---- for whoever feeds ---------------------------------------------------------------------------------------

    def feed(self, text: str) -> None:
        """The next piece; the one before it was read to its end."""
        self.text, self.pos, self._from = text, 0, 0

    # ---- for the parser ------------------------------------------------------------------------------------------

    def more(self) -> Steps[bool]:
        """Wait for text; False when none follows."""
        while self.pos == len(self.text):
            if self.ended:
                return False
            if self._kept is not None:
                self._kept.append(self.text[self._from:])
            self.text, self.pos, self._from = "", 0, 0
            yield
        return True

    def peek(self) -> Steps[str]:
        """The next character, "" at the end."""
        if self.pos == len(self.text) and not (yield from self.more()):
            return ""
        return self.text[self.pos]

    def skip(self, chars: str = SPACE) -> Steps[None]:
        """Read over any number of `chars`."""
        while (yield from self.peek()) and self.text[self.pos] in chars:
            self.pos += 1

    def expect(self, word: str) -> Steps[None]:
        for char in word:
            if (yield from self.peek()) != char:
                raise Malformed
            self.pos += 1

    def accept(self, char: str) -> Steps[bool]:
        """Read `char` if it is next."""
        if (yield from self.peek()) != char:
            return False
        self.pos += 1
        return True

    def word(self, stops: str, limit: int) -> Steps[str]:
        """Text up to one of the characters `stops`, which is not read; Malformed at the end or beyond `limit`."""
        chars: list[str] = []
        while (char := (yield from self.peek())) and char not in stops:
            if len(chars) == limit:
                raise Malformed
            chars.append(char)
            self.pos += 1
        if not char:
            raise Malformed
        return "".join(chars)

    def until(self, markers: Sequence[str], emit: Callable[[str], None]) -> Steps[str]:
        """Emit text up to the first of `markers`, which is read; "" at the end of the text.

        Of what might become a marker nothing is emitted. No marker is the beginning of another one.
        """
        found, _ = yield from self.until_space(markers, emit, trim=False)
        return found

    def until_space(self, markers: Sequence[str], emit: Callable[[str], None], held: str = "",
                    trim: bool = True) -> Steps[tuple[str, str]]:
        """As `until`, but white space ahead of a marker or of the end (HOLD_SPACE characters at most) is not emitted.

        (the marker, that white space). `held`: text that was read and not emitted before.
        """
        assert self._kept is None, "what is recorded is read character by character"
        firsts = {marker[0] for marker in markers}
        while True:
            if not (yield from self.more()):
                cut = _space_from(held, len(held)) if trim else len(held)
                emit(held[:cut])
                return "", held[cut:]
            text = held + self.text[self.pos:] if held else self.text[self.pos:] if self.pos else self.text
            begin, found = len(text), ""
            if any(first in text for first in firsts):
                for marker in markers:
                    at = text.find(marker)
                    if 0 <= at < begin:
                        begin, found = at, marker
            if found:
                cut = _space_from(text, begin) if trim else begin
                emit(text[:cut])
                self.text, self.pos = text, begin + len(found)
                self._from = self.pos
                return found, text[cut:begin]
            cut = _partial(text, markers)
            if trim:
                cut = _space_from(text, cut)
            emit(text[:cut])
            held, self.pos = text[cut:], len(self.text)

    # ---- giving back ---------------------------------------------------------------------------------------------

    def mark(self, before: str = "") -> None:
        """Record what is read from here on; `before` stands ahead of it."""
        self._kept, self._from = [before], self.pos

    def forget(self) -> None:
        """Stop recording."""
        self._kept = None

    def give_back(self) -> str:
        """What was recorded; recording stops."""
        kept, self._kept = self._kept, None
        return "" if kept is None else "".join(kept) + self.text[self._from:self.pos]


def _space_from(text: str, end: int) -> int:
    """Where the white space in front of `end` begins, HOLD_SPACE characters at most."""
    begin = end
    while begin > 0 and end - begin < HOLD_SPACE and text[begin - 1] in SPACE:
        begin -= 1
    return begin


def _partial(text: str, markers: Sequence[str]) -> int:
    """Where the longest end of `text` begins that may become a marker; its length where there is none."""
    size = len(text)
    begin = max(0, size - max([len(marker) for marker in markers], default=1) + 1)
    for at in range(begin, size):
        tail = text[at:]
        if any(marker.startswith(tail) for marker in markers):
            return at
    return size
