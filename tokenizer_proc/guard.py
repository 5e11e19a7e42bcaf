"""Text of users that spells control tokens: found before a chat is rendered, kept apart when it is encoded.

Run by the tokenizer. A special token inside a message would otherwise become the real token and could end the turn or
begin another role. Such spellings are wrapped in two characters that occur nowhere in the request; after rendering, what
stands between them is encoded as ordinary text, while the template's own control tokens stay tokens.
"""
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from pipeline.errors import QuartetError

# Egyptian hieroglyphs and Tangut. Not private-use characters: those are escaped where a template prints a list or a
# mapping as Python does, and an escaped mark guards nothing.
MARKS = (*range(0x13000, 0x1342F), *range(0x17000, 0x187F8))
MAX_TOKEN = 256                          # characters; no control token is longer
Piece = tuple[str, bool]                 # text, and whether it must not become special tokens


def token_pattern(tokens: Iterable[str]) -> str:
    """A regular expression for any of `tokens`, longest first, built as a trie so that no position is tried often."""
    trie: dict[str, Any] = {}
    for token in tokens:
        node = trie
        for char in token:
            node = node.setdefault(char, {})
        node[""] = {}

    def pattern(node: dict[str, Any]) -> str:
        branches = [re.escape(char) + pattern(child) for char, child in node.items() if char]
        if not branches:
            return ""
        joined = branches[0] if len(branches) == 1 and "" not in node else f"(?:{'|'.join(branches)})"
        return joined + "?" if "" in node else joined
    return pattern(trie)


def strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            yield item
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)


def unused(values: Iterable[str], count: int) -> str:
    """`count` rare characters that are in none of `values`; QuartetError where those use them all."""
    taken = {char for value in values if not value.isascii() for char in value if ord(char) >= MARKS[0]}
    free = "".join(char for char in islice((c for c in map(chr, MARKS) if c not in taken), count))
    if len(free) < count:
        raise QuartetError("invalid_value", "The messages use too many different rare characters.", "messages")
    return free


class Guard:
    """The control tokens of one model."""

    __slots__ = ("_pattern", "_tokens")

    def __init__(self, tokens: Iterable[str]) -> None:
        self._pattern = token_pattern(sorted({token for token in tokens if 0 < len(token) <= MAX_TOKEN}))
        self._tokens = re.compile(self._pattern) if self._pattern else None

    def wrap(self, value: Any) -> tuple[Any, str]:
        """(`value` with its control tokens wrapped, the two characters that wrap them); "" when there are none."""
        search = None if self._tokens is None else self._tokens.search
        if search is None or not any(search(text) for text in strings(value)):
            return value, ""
        marks = unused(strings(value), 2)
        return self._wrapped(value, f"{marks[0]}\\g<0>{marks[1]}"), marks

    def _wrapped(self, value: Any, replacement: str) -> Any:
        if isinstance(value, str):
            assert self._tokens is not None
            return self._tokens.sub(replacement, value)
        if isinstance(value, dict):
            return {self._wrapped(k, replacement): self._wrapped(v, replacement) for k, v in value.items()}
        if isinstance(value, list):
            return [self._wrapped(item, replacement) for item in value]
        return value

    def pieces(self, text: str, marks: str) -> list[Piece]:
        """`text` cut at the marks. A mark whose partner the template dropped still separates what it stood between."""
        if not marks:
            return [(text, False)]
        parts = re.split(f"{marks[0]}({self._pattern}){marks[1]}|[{marks}]", text)
        return [(part, n % 2 == 1) for n, part in enumerate(parts) if part]
