"""EBNF as GBNF and XGrammar write it (``root ::= "a" b* | [0-9]+``) to Lark, in one pass over the text.

Run by the tokenizer. Rules are renamed, so that no name means something to the library. Unusable, with the line, for
whatever is no such grammar.
"""
from __future__ import annotations

import re

from tokenizer_proc.json_schemas import Unusable
from tokenizer_proc.lark import quoted

MAX_NESTING = 100
_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_COUNT = re.compile(r"\{\s*(\d{1,6})\s*(?:(,)\s*(\d{1,6})?\s*)?\}")
_STRING = re.compile(r'"((?:[^"\\\n]|\\.)*)"|\'((?:[^\'\\\n]|\\.)*)\'')
_CLASS = re.compile(r"\[\^?(?:[^\]\\\n]|\\.)*\]")
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_PLAIN = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "b": "\b", "f": "\f"}


def to_lark(text: str) -> str:
    """The Lark grammar of `text`, whose first symbol is its ``root``."""
    return _Parser(text).grammar()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._names: dict[str, str] = {}
        self._used: dict[str, int] = {}                   # name -> where it is used first

    def grammar(self) -> str:
        rules: dict[str, str] = {}
        self._skip()
        while self._at < len(self._text):
            name = self._word()
            self._expect("::=")
            if name in rules:
                raise self._wrong(f"the rule '{name[:40]}' is there twice")
            rules[name] = self._choice(0)
        if "root" not in rules:
            raise Unusable("The grammar cannot be read: it has no rule 'root'.")
        for name, at in self._used.items():
            if name not in rules:
                self._at = at
                raise self._wrong(f"there is no rule '{name[:40]}'")
        return "\n".join(["%llguidance {}", *(f"{self._rename(name)}: {body}" for name, body in rules.items())]) + "\n"

    def _rename(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = "start" if name == "root" else f"n{len(self._names)}"
        return self._names[name]

    # ---- expressions ---------------------------------------------------------------------------------------------

    def _choice(self, depth: int) -> str:
        if depth > MAX_NESTING:
            raise self._wrong("it is nested too deep")
        options = [self._sequence(depth)]
        while self._accept("|"):
            options.append(self._sequence(depth))
        return " | ".join(options)

    def _sequence(self, depth: int) -> str:
        parts = []
        while (part := self._item(depth)) is not None:
            parts.append(part)
        return " ".join(parts) or '""'

    def _item(self, depth: int) -> str | None:
        at, text = self._at, self._text
        char = text[at:at + 1]
        if char == "(":
            self._expect("(")
            atom = f"({self._choice(depth + 1)})"
            self._expect(")")
        elif char in ('"', "'") and char:
            atom = quoted(self._literal())
        elif char == "[":
            atom = self._class()
        elif char == ".":
            self._expect(".")
            atom = "/(?s:.)/"
        else:
            name = _NAME.match(text, at)
            if name is None:
                return None
            after = _SPACE.match(text, name.end())
            assert after is not None
            if text.startswith("::=", after.end()):       # the next rule begins
                return None
            self._used.setdefault(name.group(), at)
            self._move(name.end())
            atom = self._rename(name.group())
        return atom + self._repeat()

    def _repeat(self) -> str:
        char = self._text[self._at:self._at + 1]
        if char in ("*", "+", "?") and char:
            self._expect(char)
            return char
        count = _COUNT.match(self._text, self._at)
        if count is None:
            return ""
        self._move(count.end())
        low, many, high = count.groups()
        return f"{{{low},{high or ''}}}" if many else f"{{{low}}}"

    def _literal(self) -> str:
        match = _STRING.match(self._text, self._at)
        if match is None:
            raise self._wrong("a string has no end")
        body = match.group(1) if match.group(1) is not None else match.group(2)
        value = _ESCAPE.sub(self._char, body)
        self._move(match.end())
        return value

    def _char(self, match: re.Match[str]) -> str:
        code = match.group(1) or match.group(2) or match.group(3)
        if code is None:
            return _PLAIN.get(match.group(4), match.group(4))
        if int(code, 16) > 0x10FFFF or 0xD800 <= int(code, 16) < 0xE000:
            raise self._wrong("an escape names no character")
        return chr(int(code, 16))

    def _class(self) -> str:
        """A character class; its escapes are made explicit, the rest is as in a regular expression."""
        match = _CLASS.match(self._text, self._at)
        if match is None:
            raise self._wrong("a character class has no end")
        body = match.group()[1:-1]
        negated = body.startswith("^")
        parts, at = list[str](), int(negated)
        while at < len(body):
            escape = _ESCAPE.match(body, at)
            char, at = (self._char(escape), escape.end()) if escape is not None else (body[at], at + 1)
            ranged = char == "-" and escape is None and parts and at < len(body)
            parts.append("-" if ranged else f"\\x{{{ord(char):x}}}")
        self._move(match.end())
        if not parts:
            if negated:
                return "/(?s:.)/"
            raise self._wrong("a character class is empty")
        return f"/[{'^' if negated else ''}{''.join(parts)}]/"

    # ---- reading -------------------------------------------------------------------------------------------------

    def _move(self, at: int) -> None:
        self._at = at
        self._skip()

    def _skip(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()

    def _word(self) -> str:
        match = _NAME.match(self._text, self._at)
        if match is None:
            raise self._wrong("the name of a rule is expected")
        self._move(match.end())
        return match.group()

    def _accept(self, word: str) -> bool:
        if not self._text.startswith(word, self._at):
            return False
        self._move(self._at + len(word))
        return True

    def _expect(self, word: str) -> None:
        if not self._accept(word):
            raise self._wrong(f"'{word}' is expected")

    def _wrong(self, what: str) -> Unusable:
        line = self._text.count("\n", 0, self._at) + 1
        return Unusable(f"The grammar cannot be read: {what} in line {line}.")
