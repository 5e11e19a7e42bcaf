"""How a model sees two texts in one input: which special ids stand around them, and which token type each part has.

Run by the tokenizer. Learnt from the tokenizer's own post-processor, once, so that joining two texts is plain lists.
"""
from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from tokenizers import Tokenizer


@dataclass(frozen=True, slots=True)
class PairShape:
    """Special ids before, between and after two texts, and the token types of all five parts."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    types: tuple[bytes, int, bytes, int, bytes]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> PairShape:
        encoding = tokenizer.encode("a", "b", add_special_tokens=True)
        ids, types, places = encoding.ids, encoding.type_ids, encoding.sequence_ids
        first = [n for n, place in enumerate(places) if place == 0]
        second = [n for n, place in enumerate(places) if place == 1]
        if not first or not second:                      # a tokenizer that knows neither letter: nothing to learn from
            return cls((), (), (), (b"", 0, b"", 0, b""))
        a, b, c, d = first[0], first[-1] + 1, second[0], second[-1] + 1
        return cls(tuple(ids[:a]), tuple(ids[b:c]), tuple(ids[d:]),
                   (bytes(types[:a]), types[a], bytes(types[b:c]), types[c], bytes(types[d:])))

    @property
    def num_special(self) -> int:
        return len(self.before) + len(self.between) + len(self.after)

    def join(self, first: Sequence[int], second: Sequence[int]) -> tuple[array[int], bytes]:
        """Ids and the type of each."""
        ids = array("I", [*self.before, *first, *self.between, *second, *self.after])
        before, a, between, b, after = self.types
        return ids, b"".join((before, bytes([a]) * len(first), between, bytes([b]) * len(second), after))
