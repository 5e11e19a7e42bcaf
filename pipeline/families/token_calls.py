"""Families that frame calls by control tokens of their own: deepseek_v3, deepseek_v31 and kimi_k2.

Run by the detokenizer, which shows their tokens to the parser whether or not special tokens are shown to the user.
"""
from __future__ import annotations

from pipeline.families import json_text
from pipeline.families.calls import MAX_NAME, MarkedParser
from pipeline.families.reader import SPACE, Malformed, Steps


class DeepSeekV31(MarkedParser):
    """``<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>ARGUMENTS<｜tool▁call▁end｜>``, repeated between begin and end of the calls."""

    markers = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁calls▁end｜>")
    closers = ("<｜tool▁call▁end｜>",)
    separator = "<｜tool▁sep｜>"

    def section(self, marker: str) -> Steps[None]:
        if marker != self.markers[1]:
            return
        yield from self.head()
        yield from json_text.copy_value(self.reader, self.arguments)
        self.close()
        yield from self.optional("```")
        yield from self.optional(self.closers[0])

    def head(self) -> Steps[None]:
        """Read up to the arguments and announce the call."""
        name = yield from self.reader.word("<", MAX_NAME)
        yield from self.reader.expect(self.separator)
        yield from self.open(name)

    def open(self, name: str) -> Steps[None]:
        name = self.check_name(name.strip(SPACE))
        yield from self.reader.skip()
        if (yield from self.reader.peek()) != "{":
            raise Malformed
        self.announce(name)


class DeepSeekV3(DeepSeekV31):
    """``<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\nARGUMENTS\\n```<｜tool▁call▁end｜>``."""

    def head(self) -> Steps[None]:
        yield from self.reader.skip()
        yield from self.reader.expect("function" + self.separator)
        name = yield from self.reader.word("\n`{", MAX_NAME)
        yield from self.reader.skip()
        if (yield from self.reader.peek()) == "`":
            yield from self.reader.expect("```json")
        yield from self.open(name)


class KimiK2(DeepSeekV31):
    """``<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>ARGUMENTS<|tool_call_end|>``, in a section."""

    markers = ("<|tool_calls_section_begin|>", "<|tool_call_begin|>", "<|tool_calls_section_end|>")
    closers = ("<|tool_call_end|>",)
    separator = "<|tool_call_argument_begin|>"

    def open(self, name: str) -> Steps[None]:
        name = name.strip(SPACE).removeprefix("functions.")
        front, colon, number = name.rpartition(":")
        yield from super().open(front if colon and number.isdigit() else name)
