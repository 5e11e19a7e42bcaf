"""A request's Grammar record to the language of `llguidance`, and the thread that checks what came out.

Run by the tokenizer. Conversion is short Python within bounds of size and depth; the check is the library's own compiler
under its limits of work, which releases the interpreter's lock, so that the stage goes on meanwhile. What took too long
is refused; what was found good is remembered by its digest.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher, LLParserLimits
from tokenizers import Tokenizer

from pipeline import grammars
from pipeline.errors import QuartetError, invalid
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
CHECK_S = 3.0                        # from handing over; the queue counts too
KNOWN = 4096                         # digests of grammars that are good
TAIL = 16                            # prompt ids among which the end of a reasoning is looked for
THREADS = 2                          # one hostile grammar does not hold up the next
SPACES = r"/[ \t\r\n]{1,4}/"        # between a reasoning and its answer
HARMONY_FINAL = "<|channel|>final<|message|>"
log = logging.getLogger(__name__)


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
        return _schema(prepare(json.loads(text), grammar.whitespace, grammar.closed))
    if kind == grammars.JSON_OBJECT:
        return _schema(prepare({"type": "object"}, grammar.whitespace, False))
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


class GrammarChecker:
    """Checks grammars beside the loop. `threaded` False: at once."""

    def __init__(self, threaded: bool = True) -> None:
        self._threaded = threaded
        self._todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._done: deque[tuple[int, str, str]] = deque()
        self._threads: list[threading.Thread] = []
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def knows(self, text: str) -> bool:
        """Whether this grammar was found good before."""
        key = _digest(text)
        if key not in self._known:
            return False
        self._known.move_to_end(key)
        return True

    def submit(self, rid: int, text: str) -> None:
        if not self._threaded:
            self._done.append((rid, text, check(text)))
            return
        if not self._threads:
            self._threads = [threading.Thread(target=self._run, name=f"grammars-{i}", daemon=True)
                             for i in range(THREADS)]
            for thread in self._threads:
                thread.start()
        self._todo.put((rid, text))

    def take(self) -> list[tuple[int, QuartetError | None]]:
        """What was checked since the last call: the request, and what is wrong."""
        taken: list[tuple[int, QuartetError | None]] = []
        while self._done:
            rid, text, complaint = self._done.popleft()
            if complaint:
                taken.append((rid, invalid(f"The grammar cannot be used: {complaint}.")))
                continue
            self._known[_digest(text)] = None
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
            taken.append((rid, None))
        return taken

    def _run(self) -> None:
        while True:
            rid, text = self._todo.get()
            self._done.append((rid, text, check(text)))


def check(text: str) -> str:
    """What the library finds wrong with a grammar, in one line; "" for a good one."""
    try:
        complaint = LLMatcher.validate_grammar(text, None, limits=LLParserLimits(**grammars.LIMITS))
    except BaseException as error:            # the library turns a panic into a BaseException
        log.warning("a grammar could not be checked: %s", type(error).__name__)
        return "it cannot be compiled"
    if not complaint or LLMatcher.is_validate_warning(complaint):
        return ""
    lines = [line.strip() for line in complaint.splitlines() if line.strip(" |^")]
    last = lines[-1].removeprefix("error: ") if lines and lines[0].startswith("regex parse error") else lines[0]
    return "".join(char if char.isprintable() else " " for char in last)[:200].rstrip(".") or "it cannot be compiled"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
