"""The parsed side of one choice: tool calls and reasoning out of its text, and how many tokens were reasoning.

Run by the detokenizer; a pure function of the choice's text, so that a replayed choice goes on as it would have. What
the formats are is pipeline.families' business.
"""
from __future__ import annotations

import json
from collections.abc import Sequence

from detok_proc.stream import whole_text
from detok_proc.vocab import Vocab
from pipeline.families.table import MAX_TAIL, AnswerParser, marker_tokens
from pipeline.params import DetokSpec


class Answer:
    """`markers`: tokens that the text must hold, special or not."""

    __slots__ = ("markers", "reasoning_tokens", "_parser")

    def __init__(self, spec: DetokSpec, tail: str) -> None:
        self.markers = marker_tokens(spec.tool_parser, spec.reasoning_parser)
        self.reasoning_tokens = 0
        self._parser = AnswerParser(
            spec.tool_parser, spec.reasoning_parser, json.loads(spec.signatures or b"{}"), spec.max_calls, tail)

    @classmethod
    def open(cls, spec: DetokSpec, vocab: Vocab, left: Sequence[int]) -> Answer | None:
        """None where nothing is to be parsed."""
        if not spec.tool_parser and not spec.reasoning_parser:
            return None
        return cls(spec, whole_text(vocab, left[-MAX_TAIL:], skip_special=False))

    def push(self, piece: str) -> None:
        """The text that one id released; may be empty."""
        thinking = self._parser.thinking
        if piece:
            self._parser.push(piece)
        self.reasoning_tokens += thinking or self._parser.thinking

    def end(self, text: str) -> None:
        """The last of the text."""
        self._parser.push(text)
        self._parser.end()

    def take(self) -> tuple[str, list[tuple[int, int]]]:
        """(what was parsed since the last call, its spans)."""
        return self._parser.parts.take()

    @property
    def done(self) -> bool:
        return self._parser.done

    @property
    def in_call(self) -> bool:
        return self._parser.in_call
