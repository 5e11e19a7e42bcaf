"""Reasoning ahead of an answer: which tags each family sets it between, and the parser that takes it out.

Run by the detokenizer; the tokenizer and the frontend read the tags. White space next to a tag belongs to neither side.
What the parser has written depends on the text alone, as with tool parsers (pipeline.families.calls).
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

from pipeline.families.calls import Machine
from pipeline.families.parts import Part, Parts
from pipeline.families.reader import SPACE, Malformed, Steps


class Start(IntEnum):
    """Where an answer begins, as the end of its prompt tells."""

    UNKNOWN = 0                              # the prompt says nothing
    INSIDE = 1                               # the template has opened the reasoning
    OUTSIDE = 2                              # the template has closed it: there is none


@dataclass(frozen=True, slots=True, kw_only=True)
class Reasoning:
    """One family. `implied`: an answer begins inside its reasoning even where nothing opens it."""

    name: str
    openers: tuple[str, ...]
    closers: tuple[str, ...]
    implied: bool = False
    template: tuple[str, ...] = ()           # what a chat template of the family holds, all of it

    def start(self, prompt_tail: str) -> Start:
        """What the end of the prompt's text says."""
        tail = prompt_tail.rstrip(SPACE)
        if tail.endswith(self.openers):
            return Start.INSIDE
        return Start.OUTSIDE if tail.endswith(self.closers) else Start.UNKNOWN

    def begins_inside(self, prompt_tail: str) -> bool:
        """Whether the first character of the answer is certainly reasoning."""
        start = self.start(prompt_tail)
        return start is Start.INSIDE or (start is Start.UNKNOWN and self.implied)


THINK, THINK_END = "<think>", "</think>"
# The order is the order of detection. "openai_gptoss" is no tag: pipeline.families.harmony takes the whole message.
REASONINGS: Mapping[str, Reasoning] = MappingProxyType({reasoning.name: reasoning for reasoning in (
    Reasoning(name="openai_gptoss", openers=(), closers=(), template=("<|channel|>", "<|message|>")),
    Reasoning(name="mistral", openers=("[THINK]",), closers=("[/THINK]",), template=("[THINK]", "[/THINK]")),
    Reasoning(name="seed_oss", openers=("<seed:think>",), closers=("</seed:think>",), template=("<seed:think>",)),
    Reasoning(name="granite", openers=("Here is my thought process:", "Here's my thought process:"),
              closers=("Here is my response:", "Here's my response:"), template=("Here is my thought process:",)),
    Reasoning(name="qwen3", openers=(THINK,), closers=(THINK_END,), template=(THINK_END, "enable_thinking")),
    Reasoning(name="deepseek_r1", openers=(THINK,), closers=(THINK_END,), implied=True,
              template=("<｜Assistant｜><think>",)),
    Reasoning(name="think", openers=(THINK,), closers=(THINK_END,), template=(THINK_END,)),
)})


class ReasoningParser(Machine):
    """Reasoning into the parts, everything behind it into `rest` (or into the parts as content)."""

    def __init__(self, parts: Parts, reasoning: Reasoning, prompt_tail: str, rest: Machine | None) -> None:
        self._reasoning, self._rest = reasoning, rest
        self._start = reasoning.start(prompt_tail)
        self.thinking = reasoning.begins_inside(prompt_tail)
        super().__init__(parts)

    def run(self) -> Steps[None]:
        reader = self.reader
        if self._start is not Start.OUTSIDE:
            yield from self._open()
        if self.thinking:
            yield from reader.skip()
            closer, _ = yield from reader.until_space(self._reasoning.closers, self._think)
            self.thinking = False
            if closer:
                yield from reader.skip()
        while (yield from reader.more()):
            self._pass_on(reader.text[reader.pos:])
            reader.pos = len(reader.text)
        if self._rest is not None:
            self._rest.end()

    def _open(self) -> Steps[None]:
        """Read an opening tag; what turns out to be none is reasoning where that was begun, content else.

        Begun reasoning may also end at once.
        """
        reader, closers = self.reader, self._reasoning.closers if self.thinking else ()
        reader.mark()
        matched = ""
        try:
            yield from reader.skip()
            tags = (*self._reasoning.openers, *closers)
            while matched not in tags:
                char = yield from reader.peek()
                if not char or not any(tag.startswith(matched + char) for tag in tags):
                    raise Malformed
                matched += char
                reader.pos += 1
        except Malformed:
            kept = reader.give_back()
            if self.thinking:
                self._think(kept.lstrip(SPACE))
            else:
                self._pass_on(kept)
            return
        reader.forget()
        self.thinking = matched not in closers
        if not self.thinking:
            yield from reader.skip()

    def _think(self, text: str) -> None:
        self.parts.add(Part.REASONING, text)

    def _pass_on(self, text: str) -> None:
        if self._rest is None:
            self.content(text)
        elif text:
            self._rest.push(text)
