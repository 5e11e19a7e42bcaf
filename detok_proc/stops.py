"""Stop strings of one choice: exact matches as text arrives, and the least text that must be held back for them.

Run by the detokenizer. Each string has a Knuth-Morris-Pratt matcher whose failure table grows only as far as the text
has ever matched, so that scanning is linear in the text and opening a choice costs nothing. The earliest match by its
end wins; of two that end together, the longer.
"""
from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Pattern:
    """One stop string and how much of it the text so far ends with."""

    text: str
    state: int = 0                                        # < len(text)
    failure: list[int] = field(default_factory=lambda: [0])   # failure[k - 1]: longest proper border of text[:k]

    def scan(self, piece: str, live: bool) -> int:
        """Characters of `piece` up to the end of the first match; -1 for none. Not `live`: matches do not count."""
        text, state, size, position, end = self.text, self.state, len(self.text), 0, len(piece)
        while position < end:
            if state == 0:
                position = piece.find(text[0], position) + 1
                if not position:
                    break
                state = 1
            elif text[state] == piece[position]:
                state += 1
                position += 1
            else:
                state = self._border(state)
                continue
            if state == size:
                if live:
                    self.state = 0
                    return position
                state = self._border(size)
        self.state = state
        return -1

    def _border(self, length: int) -> int:
        """The longest proper prefix of text[:length] that is also its suffix."""
        failure, text = self.failure, self.text
        while len(failure) < length:
            state, char = failure[-1], text[len(failure)]
            while state and text[state] != char:
                state = failure[state - 1]
            failure.append(state + 1 if text[state] == char else 0)
        return failure[length - 1]


class Stops:
    """The stop strings of one choice. After a hit, `hit` is the string, and nothing may be pushed any more."""

    __slots__ = ("hit", "held", "_patterns", "_firsts", "_include", "_quiet")

    def __init__(self, stops: list[str], include_stop: bool) -> None:
        assert stops and all(stops)
        self._patterns = [Pattern(stop) for stop in dict.fromkeys(stops)]
        self._firsts = frozenset(stop[0] for stop in stops)
        self._include = include_stop
        self._quiet = True                    # no pattern has matched anything at the end of the text
        self.held = ""
        self.hit: str | None = None

    def push(self, piece: str, live: bool) -> str:
        """The text that may be shown now. `live`: a match that ends in this piece counts."""
        if self._quiet and self._firsts.isdisjoint(piece):
            return piece
        best, size = -1, 0
        for pattern in self._patterns:
            end = pattern.scan(piece, live)
            if end >= 0 and (best < 0 or (end, -len(pattern.text)) < (best, -size)):
                best, size, self.hit = end, len(pattern.text), pattern.text
        text = self.held + piece
        if self.hit is not None:
            cut, self.held = len(self.held) + best - (0 if self._include else size), ""
            return text[:cut]
        longest = max([pattern.state for pattern in self._patterns])
        self._quiet = longest == 0
        if self._include:                     # what a match would show can be shown before it is complete
            return text
        cut = len(text) - longest
        self.held = text[cut:]
        return text[:cut]

    def end(self) -> str:
        """What was held back, when no text follows."""
        text, self.held = self.held, ""
        return text
