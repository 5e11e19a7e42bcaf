"""Pythonic calls: ``[f(a=1, b="x"), g()]``, as the whole message or between ``<|python_start|>`` and ``<|python_end|>``.

A small reader of Python literals: nothing is ever evaluated. Run by the detokenizer.
"""
from __future__ import annotations

import json
from collections.abc import Callable

from pipeline.families.calls import MAX_NAME, BuildingParser
from pipeline.families.json_text import MAX_DEPTH, characters, is_number
from pipeline.families.reader import SPACE, Malformed, Reader, Steps

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "0": "\0", "\\": "\\",
            "'": "'", '"': '"', "\n": ""}
_CODES = {"x": 2, "u": 4, "U": 8}
_WORDS = {"True": "true", "False": "false", "None": "null", "true": "true", "false": "false", "null": "null"}
_CLOSERS = {"[": "]", "(": ")", "{": "}"}
_MAX_TOKEN = 512                             # characters of a number or word
Emit = Callable[[str], None]


class Pythonic(BuildingParser):
    """The name of a known tool and a parenthesis are what tells a call from a list."""

    markers = ("<|python_start|>",)

    def section(self, marker: str) -> Steps[None]:
        yield from self.reader.skip()
        yield from self._calls()
        yield from self.optional("<|python_end|>")

    def whole_message(self) -> Steps[str]:
        reader = self.reader
        reader.mark()
        try:
            yield from reader.skip()
            if (yield from reader.peek()) == "[":
                yield from self._calls()
        except Malformed:
            yield from self.recover()
        kept = reader.give_back()
        return kept if not kept.strip(SPACE) else ""

    def _calls(self) -> Steps[None]:
        reader = self.reader
        yield from reader.expect("[")
        while True:
            yield from reader.skip()
            name = self.known_name((yield from reader.word("(", MAX_NAME)).strip(SPACE))
            yield from reader.expect("(")
            self.begin(name)
            yield from self._parameters()
            self.finish()
            yield from reader.skip()
            if not (yield from reader.accept(",")):
                break
        yield from reader.expect("]")

    def _parameters(self) -> Steps[None]:
        reader = self.reader
        while True:
            yield from reader.skip()
            if (yield from reader.accept(")")):
                return
            key = (yield from reader.word("=,()[]{}\"'", MAX_NAME)).strip(SPACE)
            yield from reader.expect("=")
            if not key.isidentifier():
                raise Malformed
            yield from reader.skip()
            pieces: list[str] = []
            yield from read_literal(reader, pieces.append)
            self.key(key)
            self.arguments("".join(pieces))
            yield from reader.skip()
            if not (yield from reader.accept(",")):
                yield from reader.expect(")")
                return


def read_literal(reader: Reader, emit: Emit) -> Steps[None]:
    """Read one Python literal, handing on JSON. Malformed for what is none."""
    closers: list[str] = []
    while True:
        char = yield from reader.peek()
        opened = char in _CLOSERS
        if opened:
            if len(closers) == MAX_DEPTH:
                raise Malformed
            reader.pos += 1
            closers.append(_CLOSERS[char])
            emit("{" if char == "{" else "[")
            yield from reader.skip()
            if (yield from reader.peek()) != closers[-1]:
                if char == "{":
                    yield from _read_key(reader, emit)
                continue
        else:
            yield from _read_scalar(reader, emit)
        while True:
            if not closers:
                return
            yield from reader.skip()
            if not opened and (yield from reader.accept(",")):
                yield from reader.skip()
                if (yield from reader.peek()) != closers[-1]:          # a comma may stand in front of the end
                    emit(", ")
                    if closers[-1] == "}":
                        yield from _read_key(reader, emit)
                    break
            yield from reader.expect(closers[-1])
            emit("}" if closers.pop() == "}" else "]")
            opened = False


def _read_key(reader: Reader, emit: Emit) -> Steps[None]:
    if (yield from reader.peek()) not in ("'", '"'):
        raise Malformed
    emit(json.dumps((yield from _read_string(reader)), ensure_ascii=False) + ": ")
    yield from reader.skip()
    yield from reader.expect(":")
    yield from reader.skip()


def _read_scalar(reader: Reader, emit: Emit) -> Steps[None]:
    char = yield from reader.peek()
    if char in ("'", '"'):
        emit(json.dumps((yield from _read_string(reader)), ensure_ascii=False))
        return
    word = (yield from reader.word(",)]} \t\r\n", _MAX_TOKEN))
    if word not in _WORDS and not is_number(word):
        raise Malformed
    emit(_WORDS.get(word, word))


def _read_string(reader: Reader) -> Steps[str]:
    quote = yield from reader.peek()
    reader.pos += 1
    pieces: list[str] = []
    while True:
        char = yield from reader.peek()
        if not char:
            raise Malformed
        reader.pos += 1
        if char == quote:
            return characters("".join(pieces))
        pieces.append((yield from _read_escape(reader)) if char == "\\" else char)


def _read_escape(reader: Reader) -> Steps[str]:
    char = yield from reader.peek()
    if not char:
        raise Malformed
    reader.pos += 1
    digits = ""
    for _ in range(_CODES.get(char, 0)):
        digit = yield from reader.peek()
        if digit not in "0123456789abcdefABCDEF" or not digit:
            raise Malformed
        digits += digit
        reader.pos += 1
    if digits:
        code = int(digits, 16)
        if code > 0x10FFFF:
            raise Malformed
        return chr(code)
    return _ESCAPES.get(char, "\\" + char)
