"""Families that write calls as JSON objects, between tags or in a list behind a marker.

hermes (Qwen2.5, Qwen3, Hermes, Granite 4), llama3_json, mistral, granite, phi4_mini_json, and the plain JSON list that a
model without a format of its own is made to write. Run by the detokenizer.
"""
from __future__ import annotations

from pipeline.families import json_text
from pipeline.families.calls import MAX_NAME, MarkedParser
from pipeline.families.reader import SPACE, Malformed, Steps


class Hermes(MarkedParser):
    """``<tool_call>`` object ``</tool_call>``, repeated."""

    markers = ("<tool_call>",)
    closers = ("</tool_call>",)

    def section(self, marker: str) -> Steps[None]:
        yield from self.reader.skip()
        yield from self.json_call()
        while (yield from self.reader.accept("}")):            # one brace too many is a common slip
            pass
        yield from self.optional(self.closers[0])


class ListParser(MarkedParser):
    """A marker and a JSON list of calls, or a single call."""

    def section(self, marker: str) -> Steps[None]:
        yield from self.reader.skip()
        yield from self.calls()

    def calls(self, known: bool = False) -> Steps[None]:
        """A list of calls, or one call."""
        if (yield from self.reader.accept("[")):
            yield from self.items(known)
        else:
            yield from self.json_call(known)

    def items(self, known: bool = False) -> Steps[None]:
        """The calls of a list whose bracket was read."""
        while True:
            yield from self.reader.skip()
            yield from self.json_call(known)
            yield from self.reader.skip()
            if not (yield from self.reader.accept(",")):
                break
        yield from self.reader.expect("]")


class Granite(ListParser):
    """``<|tool_call|>`` list (3.1 and later; before, ``<tool_call>`` list)."""

    markers = ("<|tool_call|>", "<tool_call>")


class Phi4Mini(ListParser):
    """``functools`` list, or ``<|tool_call|>`` list ``<|/tool_call|>``."""

    markers = ("functools[", "<|tool_call|>")

    def section(self, marker: str) -> Steps[None]:
        if marker == "functools[":
            yield from self.items()
        else:
            yield from super().section(marker)
            yield from self.optional("<|/tool_call|>")


class Mistral(ListParser):
    """``[TOOL_CALLS]`` list, or ``[TOOL_CALLS]`` name arguments, repeated, with an optional ``[CALL_ID]`` and ``[ARGS]``."""

    markers = ("[TOOL_CALLS]",)

    def section(self, marker: str) -> Steps[None]:
        reader = self.reader
        yield from reader.skip()
        if (yield from reader.peek()) in ("[", "{"):
            yield from self.calls()
            return
        name = (yield from reader.word("[{", MAX_NAME)).strip(SPACE)
        if (yield from reader.peek()) == "[":
            yield from reader.expect("[")
            if (yield from reader.peek()) == "C":
                yield from reader.expect("CALL_ID]")
                yield from reader.word("[", MAX_NAME)
                yield from reader.expect("[")
            yield from reader.expect("ARGS]")
            yield from reader.skip()
        if (yield from reader.peek()) != "{":
            raise Malformed
        self.announce(self.check_name(name))
        yield from json_text.copy_value(reader, self.arguments)
        self.close()


class Llama3(MarkedParser):
    """Objects with a name and parameters, separated by ``;``, behind ``<|python_tag|>`` or as the whole message."""

    markers = ("<|python_tag|>",)

    def section(self, marker: str) -> Steps[None]:
        yield from self.reader.skip()
        yield from self._objects(known=False)

    def _objects(self, known: bool) -> Steps[None]:
        reader = self.reader
        while True:
            yield from self.json_call(known)
            reader.mark()
            yield from reader.skip()
            if not (yield from reader.accept(";")) and not (yield from reader.accept(",")):
                return
            yield from reader.skip()
            if (yield from reader.peek()) != "{":
                raise Malformed

    def whole_message(self) -> Steps[str]:
        """This family's calls have no marker as a rule: the known name of a tool is enough to tell one."""
        reader = self.reader
        reader.mark()
        try:
            yield from reader.skip()
            if (yield from reader.peek()) == "{":
                yield from self._objects(known=True)
        except Malformed:
            yield from self.recover()
        kept = reader.give_back()
        return kept if not kept.strip(SPACE) else ""


class JsonList(ListParser):
    """What a model without a format of its own writes: one call, or a list of calls, at the start of the message."""

    def whole_message(self) -> Steps[str]:
        reader = self.reader
        reader.mark()
        try:
            yield from reader.skip()
            if (yield from reader.peek()) in ("[", "{"):
                yield from self.calls(known=True)
        except Malformed:
            yield from self.recover()
        kept = reader.give_back()
        return kept if not kept.strip(SPACE) else ""
