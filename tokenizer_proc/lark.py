"""Pieces of the Lark dialect that the grammar library speaks: texts, patterns, rules, and the whole grammar.

Run by the tokenizer. A text that holds a token of the model's own (``<tool_call>``) may come as that token or spelled out:
which one a model was trained to write is not ours to know, and the library keeps the two apart.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from tokenizer_proc.json_schemas import Unusable

ANYTHING = r"/(?s:.*)/"


def quoted(text: str) -> str:
    """A string literal for exactly `text`."""
    return '"' + "".join(char if " " <= char < "\x7f" and char not in '"\\' else _escape(char) for char in text) + '"'


def _escape(char: str) -> str:
    try:
        char.encode()
    except UnicodeEncodeError:
        raise Unusable("The grammar holds an unpaired surrogate, which is no character.") from None
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else json.dumps(char)[1:-1]


def pattern(regex: str) -> str:
    """A regular expression literal."""
    if "\0" in regex:
        raise Unusable("The pattern holds a NUL character.")
    return "/" + regex_to_lark(regex, "").replace("\n", "\\n").replace("\r", "\\r") + "/"


class Writer:
    """Collects rules and the grammars that they refer to. `tokens`: text -> id of the model's added tokens."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        self._tokens = tokens
        self._split = re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))) if tokens else None
        self._rules: list[str] = []
        self._others: list[dict[str, str]] = []

    def rule(self, body: str, attributes: str = "") -> str:
        """A new rule; its name."""
        name = f"r{len(self._rules)}"
        self._rules.append(f"{name}{attributes}: {body}")
        return name

    def text(self, text: str) -> str:
        """An expression for exactly `text`, its tokens as tokens or spelled out. An empty text is an empty expression."""
        if not text or self._split is None:
            return quoted(text) if text else ""
        parts, at = [], 0
        for match in self._split.finditer(text):
            parts += [quoted(text[at:match.start()])] if match.start() > at else []
            parts.append(f"(<[{self._tokens[match.group()]}]> | {quoted(match.group())})")
            at = match.end()
        return " ".join([*parts, *([quoted(text[at:])] if at < len(text) else [])])

    def until(self, end: str) -> str:
        """An expression for any text that ends with the first `end`."""
        spelled = self.rule(f"{ANYTHING} {quoted(end)}", "[lazy]")
        if end not in self._tokens:
            return spelled
        return f"({self.rule(f'{self.rule(ANYTHING)} <[{self._tokens[end]}]>')} | {spelled})"

    def other(self, lark: str) -> str:
        """A reference to a whole grammar of its own."""
        name = f"g{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": lark})
        return "@" + name

    def grammar(self, start: str, others: Sequence[dict[str, Any]] = ()) -> str:
        """The finished grammar, which begins with the expression `start`; `others` are ones that it refers to."""
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"
        return json.dumps({"grammars": [{"name": "main", "lark_grammar": lark}, *self._others, *others]})
