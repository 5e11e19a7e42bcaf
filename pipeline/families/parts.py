"""What the text of a chat choice is made of: spans of content, of reasoning, of tool calls.

Shared by the detokenizer, whose parsers write `Parts`, and by the frontend, which reads the spans. A stream of parts is
one text with spans over it, so that offsets into the text tell where a delta belongs. No input or output here.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import IntEnum


class Part(IntEnum):
    """What a span is. Each CALL begins a new tool call, whose arguments are the ARGUMENTS up to the next CALL."""

    CONTENT = 0
    REASONING = 1
    CALL = 2                                 # the text is the function's name
    ARGUMENTS = 3                            # a piece of the JSON text of the arguments


class Parts:
    """Text and its spans, collected until `take`."""

    __slots__ = ("texts", "spans", "num_calls")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.spans: list[tuple[int, int]] = []           # (kind, characters)
        self.num_calls = 0                               # ever

    def add(self, kind: Part, text: str) -> None:
        if not text:
            return
        self.texts.append(text)
        if kind is Part.CALL:
            self.num_calls += 1
        append_span(self.spans, kind, len(text))

    def take(self) -> tuple[str, list[tuple[int, int]]]:
        """(the text since the last call, its spans)."""
        text, spans = "".join(self.texts), self.spans
        self.texts, self.spans = [], []
        return text, spans


def append_span(spans: list[tuple[int, int]], kind: int, chars: int) -> None:
    """Add a span, joined with the one before it where both are of one kind; two calls stay two."""
    if spans and spans[-1][0] == kind and kind != Part.CALL:
        spans[-1] = (kind, spans[-1][1] + chars)
    else:
        spans.append((kind, chars))


def skip_spans(spans: Iterable[tuple[int, int]], chars: int) -> list[tuple[int, int]]:
    """The spans without their first `chars` characters."""
    rest = []
    for kind, size in spans:
        gone = min(size, chars)
        chars -= gone
        if size > gone:
            rest.append((kind, size - gone))
    return rest


def cut(text: str, spans: Iterable[tuple[int, int]]) -> Iterator[tuple[int, str]]:
    """(kind, text) of each span; a text without spans is content."""
    begin = 0
    for kind, chars in spans:
        yield kind, text[begin:begin + chars]
        begin += chars
    if begin < len(text):
        yield Part.CONTENT, text[begin:]
