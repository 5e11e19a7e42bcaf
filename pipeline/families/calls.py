"""What all tool parsers share: content until a marker, calls behind it, and the way back where they are malformed.

Run by the detokenizer, one parser per choice. What a parser has written after some text depends on that text alone,
never on how it was cut into pieces, so that a new detokenizer that replays a choice goes on as its predecessor would
have. A call is announced as soon as its name and the beginning of its arguments are known. What is malformed before
that is content; what is malformed after it is handed on as the arguments that the model wrote.
"""
from __future__ import annotations

import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from typing import ClassVar

from pipeline.families import json_text
from pipeline.families.parts import Part, Parts
from pipeline.families.reader import SPACE, Malformed, Reader, Steps

MAX_NAME = 256                               # characters of a function's name
NAME_MARKS = "_-.:/$@"                       # what a name may hold beside letters and digits
ARGUMENT_KEYS = ("arguments", "parameters")
Signatures = Mapping[str, Mapping[str, str]]  # function -> parameter -> its JSON types, separated by "|"


def is_name(name: str) -> bool:
    """Whether `name` can be a function's."""
    return 0 < len(name) <= MAX_NAME and all(char.isalnum() or char in NAME_MARKS for char in name)


class Machine(ABC):
    """A coroutine `run` over a reader: text is pushed in, parts are written."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self.reader = parts, Reader()
        self._steps = self.run()
        next(self._steps)

    @abstractmethod
    def run(self) -> Steps[None]:
        """Read to the end of the text."""

    def push(self, text: str) -> None:
        if text:
            self.reader.feed(text)
            next(self._steps, None)

    def end(self) -> None:
        """No text follows."""
        self.reader.ended = True
        next(self._steps, None)

    def content(self, text: str) -> None:
        self.parts.add(Part.CONTENT, text)


class CallParser(Machine):
    """Content and calls. Subclasses read a message."""

    def __init__(self, parts: Parts, signatures: Signatures, max_calls: int = 0) -> None:
        """`max_calls`: nothing is read beyond so many calls; 0: no limit."""
        self.signatures, self._max_calls = signatures, max_calls
        self._num_calls = 0
        self.in_call = False                 # an announced call is not complete
        self.done = False
        super().__init__(parts)

    def run(self) -> Steps[None]:
        with suppress(Enough):
            yield from self.message()

    @abstractmethod
    def message(self) -> Steps[None]:
        """Read the whole message."""

    def content(self, text: str) -> None:
        if not self.done:
            super().content(text)

    def announce(self, name: str) -> None:
        """A call begins. What was recorded is not needed any more."""
        if self.done:
            raise Enough
        self.reader.forget()
        self.in_call = True
        self.parts.add(Part.CALL, name)

    def arguments(self, text: str) -> None:
        self.parts.add(Part.ARGUMENTS, text)

    def close(self) -> None:
        """The call is complete."""
        self.in_call = False
        self._num_calls += 1
        self.done = self._num_calls == self._max_calls

    def check_name(self, name: str) -> str:
        """`name` if it can be one; Malformed else."""
        if not is_name(name):
            raise Malformed
        return name

    def known_name(self, name: str) -> str:
        """`name` if the request has such a tool; Malformed else."""
        if name not in self.signatures:
            raise Malformed
        return name


class MarkedParser(CallParser):
    """Calls behind markers: subclasses give these and read what follows one in `section`."""

    markers: ClassVar[tuple[str, ...]] = ()
    closers: ClassVar[tuple[str, ...]] = ()  # what ends a section whose call went wrong

    def message(self) -> Steps[None]:
        held = (yield from self.whole_message()) if self.signatures else ""
        while True:
            marker, space = yield from self.reader.until_space(self.markers, self.content, held)
            if not marker:
                self.content("" if self.parts.num_calls else space)
                return
            held = ""
            self.reader.mark(space + marker)
            try:
                yield from self.section(marker)
            except Malformed:
                yield from self.recover()
            self.reader.forget()

    @abstractmethod
    def section(self, marker: str) -> Steps[None]:
        """Read what follows a marker. Malformed where it does not fit."""

    def recover(self) -> Steps[None]:
        """After Malformed: what follows belongs to the call that was begun, or what was read is content."""
        if self.in_call:
            if (yield from self.reader.until(self.closers, self.arguments)):
                self.close()
        else:
            self.content(self.reader.give_back())

    def optional(self, word: str) -> Steps[None]:
        """Read `word` where it follows, perhaps after white space. What turns out not to be it is content."""
        self.reader.mark()
        try:
            yield from self.reader.skip()
            yield from self.reader.expect(word)
        except Malformed:
            self.content(self.reader.give_back().lstrip(SPACE))
        self.reader.forget()

    def json_call(self, known: bool = False) -> Steps[None]:
        """One call as a JSON object. `known`: of a tool of the request."""
        call = JsonCall(self, known, False)
        yield from call.parse()
        call.tell()

    # ---- a message that is nothing but a call ----------------------------------------------------------------------

    def whole_message(self) -> Steps[str]:
        """A message without a marker that is one call, nothing after it: held back until it is known to be one.

        Gives white space that was read and not emitted.
        """
        reader = self.reader
        reader.mark()
        try:
            yield from reader.skip()
            call = JsonCall(self, True, True)
            yield from call.parse()
            yield from reader.skip()
            if (yield from reader.peek()):
                raise Malformed
        except Malformed:
            kept = reader.give_back()
            if not kept.strip(SPACE):
                return kept
            self.content(kept)
            return ""
        call.tell()
        return ""


class BuildingParser(MarkedParser):
    """For families whose arguments are no JSON: the parser builds it, a parameter at a time."""

    def begin(self, name: str) -> None:
        self.announce(name)
        self.seen: set[str] = set()
        self.arguments("{")

    def key(self, key: str) -> None:
        """The next parameter; its value follows. Malformed where it was there before."""
        if key in self.seen:
            raise Malformed
        self.arguments((", " if self.seen else "") + json.dumps(key, ensure_ascii=False) + ": ")
        self.seen.add(key)

    def finish(self) -> None:
        self.arguments("}")
        self.close()

    def recover(self) -> Steps[None]:
        """What is wrong inside a call is left out, so that its arguments stay JSON; a call that was cut stays cut."""
        if not self.in_call:
            yield from super().recover()
        elif (yield from self.reader.peek()):
            self.finish()
            if self.closers:
                yield from self.reader.until(self.closers, lambda text: None)


class Enough(Exception):
    """There are as many calls as there may be."""


class JsonCall:
    """Reads ``{"name": ..., "arguments": {...}}``, its keys in any order, and tells its parser.

    known: an object that can only be a call of a tool of the request. late: nothing is told before `tell`.
    """

    __slots__ = ("_parser", "_known", "_late", "_name", "_kept", "_told")

    def __init__(self, parser: CallParser, known: bool, late: bool) -> None:
        self._parser, self._known, self._late = parser, known, late
        self._name = ""
        self._kept: list[str] | None = None  # arguments that came before they could be told
        self._told = False

    def parse(self) -> Steps[None]:
        """Read the object, telling what can be told."""
        yield from self._object(True)
        if not self._name:
            raise Malformed

    def tell(self) -> None:
        """Tell what has not been told."""
        if not self._told:
            self._parser.announce(self._name)
            self._parser.arguments("".join(self._kept or ("{}",)))
            self._parser.close()

    def _object(self, outer: bool) -> Steps[None]:
        reader = self._parser.reader
        yield from reader.expect("{")
        while True:
            yield from reader.skip()
            key = yield from json_text.read_string(reader, MAX_NAME)
            yield from reader.skip()
            yield from reader.expect(":")
            yield from reader.skip()
            yield from self._value(key, outer)
            yield from reader.skip()
            if not (yield from reader.accept(",")):
                break
        yield from reader.expect("}")

    def _value(self, key: str, outer: bool) -> Steps[None]:
        parser, reader = self._parser, self._parser.reader
        char = yield from reader.peek()
        if not self._name and (key == "name" or (key == "function" and char == '"')):
            name = parser.check_name((yield from json_text.read_string(reader, MAX_NAME)))
            self._name = parser.known_name(name) if self._known else name
        elif key in ARGUMENT_KEYS and self._kept is None and not self._told:
            yield from self._arguments(char)
        elif key == "function" and char == "{" and outer:
            yield from self._object(False)
        elif self._known and key not in ("type", "id"):
            raise Malformed                  # an answer that happens to be an object
        else:
            yield from json_text.skip_value(reader)

    def _arguments(self, char: str) -> Steps[None]:
        parser, reader = self._parser, self._parser.reader
        if char == "{" and self._name and not self._late:
            self._told = True
            parser.announce(self._name)
            yield from json_text.copy_value(reader, parser.arguments)
            parser.close()
            return
        kept: list[str] = []
        if char == "{":
            yield from json_text.copy_value(reader, kept.append)
        elif char == '"':                    # an object in a string, as some models write it
            kept.append(_object_in((yield from json_text.read_string(reader, sys.maxsize))))
        else:
            yield from reader.expect("null")
            kept.append("{}")
        self._kept = kept


def _object_in(text: str) -> str:
    """`text` if it is a JSON object; Malformed else."""
    kept: list[str] = []
    inner = Reader()
    inner.feed(text.strip(SPACE))
    inner.ended = True
    if not inner.text.startswith("{"):
        raise Malformed
    for _ in json_text.copy_value(inner, kept.append):
        raise AssertionError("the text is complete")
    if inner.pos != len(inner.text):
        raise Malformed
    return "".join(kept)
