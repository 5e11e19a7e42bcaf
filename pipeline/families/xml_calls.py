"""Families that write the arguments of a call as tags: qwen3_coder and glm45.

Their values are bare text, so that what they mean depends on the types that the tool declares: a string is handed on
as it comes, anything else when it is complete. Run by the detokenizer.
"""
from __future__ import annotations

import json
from collections.abc import Callable
from typing import ClassVar

from pipeline.families.calls import MAX_NAME, BuildingParser
from pipeline.families.json_text import quoted_piece
from pipeline.families.reader import SPACE, Malformed, Steps

_TYPES: dict[type, str] = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array",
                           type(None): "null", str: "string"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


def converted(text: str, types: str) -> str:
    """The JSON of a value written as `text`, for a parameter of `types` ("integer|null"; "": not declared)."""
    allowed = types.split("|") if types else list(_TYPES.values())
    if "string" not in allowed:
        text = text.strip(SPACE)
    word = _PYTHON_WORDS.get(text, text)     # models that know Python say True, False and None
    try:
        kind = _TYPES[type(json.loads(word, parse_constant=_refuse))]
    except (ValueError, RecursionError):
        kind = "string"
    if kind != "string" and (kind in allowed or (kind == "integer" and "number" in allowed)):
        return word.strip(SPACE)
    return json.dumps(text, ensure_ascii=False)


def _refuse(name: str) -> None:
    raise ValueError(name)


class TagParser(BuildingParser):
    """Values are text between tags."""

    markers: ClassVar[tuple[str, ...]] = ("<tool_call>",)
    closers = ("</tool_call>",)
    value_end: ClassVar[str] = ""

    def as_json(self) -> Steps[bool]:
        """Read a call that is written as hermes does, which these models do at times."""
        if (yield from self.reader.peek()) != "{":
            return False
        yield from self.json_call()
        yield from self.optional("</tool_call>")
        return True

    def value(self, name: str, key: str, line: bool) -> Steps[None]:
        """The value of a parameter of function `name`, up to `value_end`. `line`: it stands on lines of its own."""
        self.key(key)
        types = self.signatures.get(name, {}).get(key, "")
        if types == "string":
            self.arguments('"')
            yield from self._text(lambda piece: self.arguments(quoted_piece(piece)), line)
            self.arguments('"')
        else:
            pieces: list[str] = []
            yield from self._text(pieces.append, line)
            self.arguments(converted("".join(pieces), types))

    def _text(self, emit: Callable[[str], None], line: bool) -> Steps[None]:
        """Text up to `value_end`, less the line break that sets it off at either end. Malformed where it has no end."""
        if line:
            yield from self.reader.accept("\n")
        ends = ("\n" + self.value_end, self.value_end) if line else (self.value_end,)
        if not (yield from self.reader.until(ends, emit)):
            raise Malformed


class Qwen3Coder(TagParser):
    """``<tool_call>\\n<function=NAME>\\n<parameter=KEY>\\nVALUE\\n</parameter>\\n</function>\\n</tool_call>``."""

    markers = ("<tool_call>", "<function=")
    value_end = "</parameter>"

    def section(self, marker: str) -> Steps[None]:
        reader = self.reader
        if marker == "<tool_call>":
            yield from reader.skip()
            if (yield from self.as_json()):
                return
            yield from reader.expect("<function=")
        name = self.check_name((yield from reader.word(">", MAX_NAME)))
        yield from reader.expect(">")
        self.begin(name)
        while True:
            yield from reader.skip()
            yield from reader.expect("<")
            if not (yield from reader.accept("p")):
                break
            yield from reader.expect("arameter=")
            key = yield from reader.word(">", MAX_NAME)
            yield from reader.expect(">")
            yield from self.value(name, key, line=True)
        yield from reader.expect("/function>")
        self.finish()
        yield from self.optional("</tool_call>")


class Glm45(TagParser):
    """``<tool_call>NAME\\n<arg_key>KEY</arg_key>\\n<arg_value>VALUE</arg_value>\\n</tool_call>``."""

    value_end = "</arg_value>"

    def section(self, marker: str) -> Steps[None]:
        reader = self.reader
        yield from reader.skip()
        if (yield from self.as_json()):
            return
        name = self.check_name((yield from reader.word("<\n", MAX_NAME)).strip(SPACE))
        self.begin(name)
        while True:
            yield from reader.skip()
            yield from reader.expect("<")
            if not (yield from reader.accept("a")):
                break
            yield from reader.expect("rg_key>")
            key = yield from reader.word("<", MAX_NAME)
            yield from reader.expect("</arg_key>")
            yield from reader.skip()
            yield from reader.expect("<arg_value>")
            yield from self.value(name, key.strip(SPACE), line=False)
        yield from reader.expect("/tool_call>")
        self.finish()
