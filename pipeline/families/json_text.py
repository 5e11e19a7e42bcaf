"""JSON text read piece by piece: values are checked and copied as they arrive, whatever comes after them.

Strict JSON, with one repair: control characters inside strings, which models write and parsers refuse, are escaped.
Run by the tool parsers. Nesting is bounded and costs no recursion.
"""
from __future__ import annotations

import json
from collections.abc import Callable

from pipeline.families.reader import SPACE, Malformed, Reader, Steps

MAX_DEPTH = 128
MAX_NUMBER = 512                             # characters
_NUMBER = frozenset("0123456789+-.eE")
_HEX = frozenset("0123456789abcdefABCDEF")
_CONTROL = {code: json.dumps(chr(code))[1:-1] for code in range(0x20)}
Emit = Callable[[str], None]


def quoted_piece(text: str) -> str:
    """The inside of a JSON string that says `text`. Pieces may be joined."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def characters(text: str) -> str:
    """`text` with surrogates joined where they are a pair, and U+FFFD where they are no character."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def copy_value(reader: Reader, emit: Emit) -> Steps[None]:
    """Read one value (no white space ahead of it), handing on its text. Malformed at the first wrong character."""
    closers: list[str] = []
    while True:
        char = yield from reader.peek()
        if char in "{[" and char:
            if len(closers) == MAX_DEPTH:
                raise Malformed
            reader.pos += 1
            emit(char)
            closers.append("}" if char == "{" else "]")
            yield from copy_space(reader, emit)
            if (yield from reader.peek()) != closers[-1]:
                if char == "{":
                    yield from _copy_key(reader, emit)
                continue
        else:
            yield from copy_scalar(reader, emit)
        while True:                          # a value is complete: close what it ends
            if not closers:
                return
            yield from copy_space(reader, emit)
            char = yield from reader.peek()
            if char == closers[-1]:
                reader.pos += 1
                emit(char)
                closers.pop()
            elif char == ",":
                reader.pos += 1
                emit(char)
                yield from copy_space(reader, emit)
                if closers[-1] == "}":
                    yield from _copy_key(reader, emit)
                break
            else:
                raise Malformed


def copy_scalar(reader: Reader, emit: Emit) -> Steps[None]:
    """A string, a number, true, false or null. All but strings are handed on when they are complete."""
    char = yield from reader.peek()
    if char == '"':
        yield from copy_string(reader, emit)
    elif char in _NUMBER:
        digits: list[str] = []
        while (char := (yield from reader.peek())) in _NUMBER and char:
            if len(digits) == MAX_NUMBER:
                raise Malformed
            digits.append(char)
            reader.pos += 1
        text = "".join(digits)
        if not is_number(text):
            raise Malformed
        emit(text)
    else:
        word = {"t": "true", "f": "false", "n": "null"}.get(char)
        if word is None:
            raise Malformed
        yield from reader.expect(word)
        emit(word)


def is_number(text: str) -> bool:
    """Whether `text` is a JSON number."""
    rest = text.removeprefix("-")
    whole, _, tail = rest.replace("E", "e").partition("e")
    digits, point, fraction = whole.partition(".")
    exponent = tail[1:] if tail[:1] in ("+", "-") else tail
    return (digits.isdigit() and (digits == "0" or digits[0] != "0") and fraction.isdigit() == bool(point)
            and exponent.isdigit() == ("e" in rest.lower()))


def copy_space(reader: Reader, emit: Emit) -> Steps[None]:
    while (char := (yield from reader.peek())) and char in SPACE:
        emit(char)
        reader.pos += 1


def copy_string(reader: Reader, emit: Emit) -> Steps[None]:
    """A string with its quotes; escapes are handed on whole."""
    yield from reader.expect('"')
    emit('"')
    while True:
        if not (yield from reader.more()):
            raise Malformed
        text, begin = reader.text, reader.pos
        quote, slash = text.find('"', begin), text.find("\\", begin)
        end = min(at for at in (quote, slash, len(text)) if at >= 0)
        piece = text[begin:end]
        if piece:
            emit(piece if piece.isprintable() else piece.translate(_CONTROL))
        reader.pos = end
        if end == len(text):
            continue
        if end == quote:
            reader.pos += 1
            emit('"')
            return
        yield from _copy_escape(reader, emit)


def _copy_escape(reader: Reader, emit: Emit) -> Steps[None]:
    reader.pos += 1
    char = yield from reader.peek()
    if char == "u":
        reader.pos += 1
        digits = ""
        for _ in range(4):
            digit = yield from reader.peek()
            if digit not in _HEX:
                raise Malformed
            digits += digit
            reader.pos += 1
        emit("\\u" + digits)
    elif char and char in '"\\/bfnrt':
        reader.pos += 1
        emit("\\" + char)
    else:
        raise Malformed


def _copy_key(reader: Reader, emit: Emit) -> Steps[None]:
    yield from copy_string(reader, emit)
    yield from copy_space(reader, emit)
    yield from reader.expect(":")
    emit(":")
    yield from copy_space(reader, emit)


def read_string(reader: Reader, limit: int) -> Steps[str]:
    """A string's value; Malformed beyond `limit` characters of its text."""
    pieces: list[str] = []
    size = 0

    def keep(piece: str) -> None:
        nonlocal size
        size += len(piece)
        if size > limit:
            raise Malformed
        pieces.append(piece)
    yield from copy_string(reader, keep)
    value = json.loads("".join(pieces))
    assert isinstance(value, str)
    return characters(value)


def skip_value(reader: Reader) -> Steps[None]:
    yield from copy_value(reader, lambda piece: None)
