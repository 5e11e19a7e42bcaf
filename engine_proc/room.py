"""How much of a step is left for prompts: tokens, and the time for which they may hold up the sequences that decode.

Engine process, no torch. A token of a prompt is dearer the longer the context it attends to, so the time is counted in
tokens without any context, and one behind a context counts for more than one.
"""
from __future__ import annotations

from dataclasses import dataclass
from math import inf

LEAST_PART = 4              # of the room beside decodes, a quarter goes to the first prompt whatever its context


@dataclass(slots=True)
class Room:
    """`tokens` that the step may still take; `effort`: what prompts may cost, infinite where nobody decodes."""

    tokens: int
    effort: float = inf
    first: bool = True

    def take(self, wanted: int, cost: float) -> int:
        """Make room for up to `wanted` tokens of a prompt that cost so much each; how many there are."""
        affordable = max(self.effort, 0.0) / cost
        if self.first:                                # it must go on even at the end of a very long context
            affordable = max(affordable, self.effort / LEAST_PART, 1)
        count = int(min(wanted, self.tokens, affordable))
        self.first = False
        self.tokens -= count
        self.effort -= max(count, 1) * cost           # what does not fit leaves no room to those behind it
        return count

    @property
    def left(self) -> bool:
        return self.tokens > 0 and self.effort >= 1
