"""A request's Grammar record to the language of `llguidance`: short Python within bounds of size, depth and time.

Run by the tokenizer. Whether what comes out can be compiled is for `checker` to find out.
"""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from tokenizers import Tokenizer

from pipeline import grammars
from pipeline.errors import invalid
from pipeline.families import harmony
from pipeline.families.reasoning import REASONINGS, Start
from pipeline.families.table import HARMONY_REASONING
from pipeline.messages import pack_ids
from pipeline.params import Grammar
from tokenizer_proc.json_schemas import Unusable, prepare
from tokenizer_proc.lark import Writer, quoted
from tokenizer_proc.limits import DeadlinePassed, within
from tokenizer_proc.structural import as_lark, to_grammar

CONVERT_S = 1.0
TAIL = 16                            # prompt ids among which the end of a reasoning is looked for
SPACES = r"/[ \t\r\n]{1,4}/"        # between a reasoning and its answer
HARMONY_FINAL = "<|channel|>final<|message|>"


def compiled(grammar: Grammar, tokenizer: Tokenizer, prompt: Sequence[int], reasoning: str = "") -> Grammar:
    """The record for the engine. QuartetError, with the parameter's name, for what cannot be used.

    `prompt`: its ids. `reasoning`: the family whose reasoning may come ahead of the answer (pipeline.families); the
    constraint begins behind it.
    """
    if len(grammar.text) > grammars.MAX_GRAMMAR_BYTES or len(grammar.after) > grammars.MAX_AFTER:
        raise invalid(f"The grammar is longer than {grammars.MAX_GRAMMAR_BYTES} characters.", grammar.param)
    tokens = {token.content: number for number, token in tokenizer.get_added_tokens_decoder().items() if token.content}
    tail = tokenizer.decode(list(prompt[-TAIL:]), skip_special_tokens=False)
    try:
        text = within(CONVERT_S, lambda: convert(grammar, tokens))
        after = grammar.after
        if reasoning and not after and not _has_channels(reasoning, grammar):
            text, after = behind_reasoning(text, reasoning, tokens, tail)
    except Unusable as error:
        raise invalid(str(error), grammar.param) from None
    except DeadlinePassed:
        raise invalid("The grammar takes too long to read.", grammar.param) from None
    except (ValueError, RecursionError):
        raise invalid("The grammar cannot be read.", grammar.param) from None
    if len(text) > grammars.MAX_COMPILED_BYTES:
        raise invalid("The grammar is too large.", grammar.param)
    if after and tail.rstrip().endswith(after.rstrip()):
        after = ""                   # the prompt has said it already
    after_ids = pack_ids(tokenizer.encode(after, add_special_tokens=False).ids) if after else b""
    return dataclasses.replace(grammar, kind=grammars.COMPILED, text=text, after=after, after_ids=after_ids)


def behind_reasoning(text: str, family: str, tokens: Mapping[str, int], tail: str) -> tuple[str, str]:
    """A grammar of the library and the text after which it rules, for an answer that may begin with reasoning.

    `tail`: what the prompt ends with. Where it does not tell whether there is reasoning, the grammar takes it or not.
    """
    if family == HARMONY_REASONING:
        return text, HARMONY_FINAL
    reasoning = REASONINGS[family]
    if reasoning.start(tail) is Start.OUTSIDE:
        return text, ""
    parts = json.loads(text)["grammars"] if text.startswith("{") else [{"lark_grammar": text}]
    body, writer = {**parts[0], "name": "body"}, Writer(tokens)
    if reasoning.begins_inside(tail):
        return writer.grammar(f"{SPACES}? @body", [body, *parts[1:]]), reasoning.closers[0]
    opened = " | ".join(writer.text(opener) for opener in reasoning.openers)
    closed = " | ".join(writer.until(closer) for closer in reasoning.closers)
    return writer.grammar(f"(({opened}) ({closed}) {SPACES}?)? @body", [body, *parts[1:]]), ""


def _has_channels(reasoning: str, grammar: Grammar) -> bool:
    """Whether a constraint says itself what comes in which channel (pipeline.families.forced)."""
    return reasoning == HARMONY_REASONING and harmony.CHANNEL in grammar.text


def convert(grammar: Grammar, tokens: Mapping[str, int]) -> str:
    """The library's text of a grammar of any kind. Unusable, ValueError or RecursionError for a bad one."""
    kind, text = grammar.kind, grammar.text
    if kind == grammars.JSON_SCHEMA:
        return _schema(prepare(json.loads(text), grammar.whitespace, grammar.closed, grammar.open))
    if kind == grammars.JSON_OBJECT:
        return _schema(prepare({"type": "object"}, grammar.whitespace))
    if kind == grammars.REGEX:
        if "\0" in text:
            raise Unusable("The pattern holds a NUL character.")
        return str(LLMatcher.grammar_from_regex(text))
    if kind == grammars.CHOICE:
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(quoted(item) for item in _choices(text)) + "\n"))
    if kind in (grammars.LARK, grammars.EBNF):
        return str(LLMatcher.grammar_from_lark(as_lark(text)))
    if kind == grammars.STRUCTURAL_TAG:
        return to_grammar(json.loads(text), tokens, grammar.whitespace)
    raise Unusable("There is no such kind of grammar.")


def _schema(schema: Any) -> str:
    return grammars.dump({"grammars": [{"json_schema": schema}]})


def _choices(text: str) -> list[str]:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(item, str) for item in choices):
        raise Unusable("The choices must be a list of strings that is not empty.")
    return list(dict.fromkeys(choices))
