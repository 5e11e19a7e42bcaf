"""How the stages name constraints: the kinds of Grammar records, their bounds, and builders for each kind.

Pure data, read by the frontend (which makes records from bodies), by the tokenizer (which checks them and turns them into
the language of the `llguidance` library) and by the engine (which compiles those). Holds no state.

A format of tool calls is a structural tag (pipeline.families.forced). Where reasoning may come ahead of the answer, the
tokenizer lets the constraint begin behind it (`Grammar.after`, or within the grammar itself).
"""
from __future__ import annotations

import json
from collections.abc import Iterable
from types import MappingProxyType
from typing import Any

from pipeline.params import Grammar

JSON_SCHEMA, JSON_OBJECT, REGEX, CHOICE = "json_schema", "json_object", "regex", "choice"
LARK, EBNF, STRUCTURAL_TAG = "lark", "ebnf", "structural_tag"
KINDS = (JSON_SCHEMA, JSON_OBJECT, REGEX, CHOICE, LARK, EBNF, STRUCTURAL_TAG)
COMPILED = "llguidance"                      # tokenizer -> engine: the text is a grammar of that library
MAX_GRAMMAR_BYTES = 256 * 1024               # of one grammar's text
MAX_COMPILED_BYTES = 1024 * 1024             # of what the tokenizer makes of it
MAX_CHOICES = 10_000
MAX_AFTER = 256                              # characters
# Of llguidance, for checking and for following a grammar; its own defaults are up to ten times as generous.
LIMITS = MappingProxyType({
    "initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_items_in_row": 2000,
    "max_lexer_states": 50_000, "max_grammar_size": 300_000, "verbose_errors": False})


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_schema(schema: Any, whitespace: str | None = None, additional: bool | None = None) -> Grammar:
    """Any JSON value that is valid under `schema`, a JSON value itself.

    `additional`: whether objects may have properties that the schema does not name, where it does not say so itself;
    None: only where it puts objects together from parts that do not know of each other.
    """
    return Grammar(JSON_SCHEMA, dump(schema), whitespace=whitespace, closed=additional is False, open=additional is True)


def json_object(whitespace: str | None = None) -> Grammar:
    """Any JSON object."""
    return Grammar(JSON_OBJECT, "", whitespace=whitespace)


def choice(texts: Iterable[str]) -> Grammar:
    """Exactly one of `texts`."""
    return Grammar(CHOICE, dump(list(texts)))


def context_free(text: str) -> Grammar:
    """A grammar as users write them: EBNF (``root ::= ...``, as GBNF has it) or else Lark (``start: ...``)."""
    return Grammar(EBNF if "::=" in text else LARK, text)


def structural_tag(form: Any, whitespace: str | None = None) -> Grammar:
    """`form`: the "format" of a structural tag, as docs/structured-outputs.md describes it."""
    return Grammar(STRUCTURAL_TAG, dump({"type": "structural_tag", "format": form}), whitespace=whitespace)
