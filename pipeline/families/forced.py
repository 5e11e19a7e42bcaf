"""Calls that a grammar sees to: how each family writes them, for `tool_choice` required or named and for strict tools.

Data and pure functions over pipeline.grammars; run by the frontend. A family whose calls no grammar of ours can write
gives None: it is then made to write the plain JSON list, which the parser of that name reads.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pipeline import grammars
from pipeline.families import harmony
from pipeline.families.table import GENERIC, HARMONY
from pipeline.params import Grammar

NAME = "{name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """begin, then calls with `separator` between them, then end. A call: before, arguments, after."""

    before: str                              # NAME stands for the function's
    after: str
    begin: str = ""
    separator: str = ""
    end: str = ""
    style: str = "json"
    marker: str = ""                         # what opens a section of calls; "": calls are the whole message
    single: bool = False                     # one call an answer


FORMS: Mapping[str, Form] = MappingProxyType({
    "hermes": Form(marker="<tool_call>", before='<tool_call>\n{"name": "{name}", "arguments": ', after="}\n</tool_call>",
                   separator="\n"),
    "llama3_json": Form(before='{"name": "{name}", "parameters": ', after="}", separator="; "),
    "mistral": Form(marker="[TOOL_CALLS]", begin="[TOOL_CALLS] [", before='{"name": "{name}", "arguments": ', after="}",
                    separator=", ", end="]"),
    "granite": Form(marker="<|tool_call|>", begin="<|tool_call|>[", before='{"name": "{name}", "arguments": ', after="}",
                    separator=", ", end="]"),
    "phi4_mini_json": Form(marker="functools[", begin="functools[", before='{"name": "{name}", "arguments": ', after="}",
                           separator=", ", end="]"),
    "deepseek_v3": Form(
        marker="<｜tool▁calls▁begin｜>", begin="<｜tool▁calls▁begin｜>", separator="\n", end="<｜tool▁calls▁end｜>",
        before="<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n", after="\n```<｜tool▁call▁end｜>"),
    "deepseek_v31": Form(
        marker="<｜tool▁calls▁begin｜>", begin="<｜tool▁calls▁begin｜>", end="<｜tool▁calls▁end｜>",
        before="<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>", after="<｜tool▁call▁end｜>"),
    "kimi_k2": Form(
        marker="<|tool_calls_section_begin|>", begin="<|tool_calls_section_begin|>", end="<|tool_calls_section_end|>",
        before="<|tool_call_begin|>functions.{name}:0<|tool_call_argument_begin|>", after="<|tool_call_end|>"),
    "qwen3_coder": Form(marker="<tool_call>", before="<tool_call>\n<function={name}>\n", after="</function>\n</tool_call>",
                        separator="\n", style="qwen_xml"),
    "glm45": Form(marker="<tool_call>", before="<tool_call>{name}\n", after="</tool_call>", separator="\n", style="glm_xml"),
    HARMONY: Form(after="", single=True,
                  before=f"{harmony.CHANNEL}commentary to=functions.{{name}} {harmony.CONSTRAIN}json{harmony.MESSAGE}"),
    GENERIC: Form(begin="[", before='{"name": "{name}", "parameters": ', after="}", separator=", ", end="]"),
})
_JSON_IN_TAGS = FORMS["hermes"]              # what the parsers of tags read, too


@dataclass(frozen=True, slots=True)
class ForcedTool:
    """A tool as far as a grammar is concerned."""

    name: str
    schema: Mapping[str, Any]                # of the arguments; {}: any object
    strict: bool = False


def required(family: str, tools: Sequence[ForcedTool], parallel: bool) -> Grammar:
    """At least one call of `tools`, and nothing else. `family` is a key of FORMS."""
    calls = _calls(FORMS[family], tools, parallel)
    return _grammar(_harmony(calls) if family == HARMONY else calls)


def optional(family: str, tools: Sequence[ForcedTool], parallel: bool, otherwise: Any = None) -> Grammar:
    """Calls of `tools`, or an answer: any text, or what the format `otherwise` allows. Only strict schemas count."""
    form = FORMS[family]
    loose = [tool if tool.strict else ForcedTool(tool.name, {}) for tool in tools]
    if family == HARMONY:
        final = {"type": "tag", "begin": f"{harmony.CHANNEL}final{harmony.MESSAGE}", "end": "",
                 "content": {"type": "any_text"} if otherwise is None else otherwise}
        made: Any = _harmony({"type": "or", "elements": [_calls(form, loose, parallel), final]})
    elif otherwise is not None:
        made = {"type": "or", "elements": [_calls(form, loose, parallel), otherwise]}
    elif form.marker:
        made = {"type": "triggered_tags", "triggers": [form.marker], "stop_after_first": not parallel, "tags": [
            {"type": "tag", "begin": form.marker, "end": "", "content": _calls(form, loose, parallel, form.marker)}]}
    else:
        made = {"type": "or", "elements": [_calls(form, loose, parallel), _NO_CALL]}
    return _grammar(made)


def _grammar(made: Any) -> Grammar:
    grammar = grammars.structural_tag(made)
    grammar.param = "tools"
    return grammar


# A message that is no call where calls have no marker: it does not begin as one does.
_NO_CALL = {"type": "regex", "pattern": r"([^\s{\[][\s\S]*)?"}


def _harmony(last: Any) -> dict[str, Any]:
    """A last message, with reasoning or a preamble ahead of it."""
    ahead = [{"type": "tag", "begin": f"{harmony.CHANNEL}{channel}{harmony.MESSAGE}", "content": {"type": "any_text"},
              "end": harmony.END} for channel in ("analysis", "commentary")]
    more = {"type": "sequence", "elements": [
        {"type": "or", "elements": ahead}, {"type": "const_string", "value": f"{harmony.START}assistant"}]}
    return {"type": "sequence", "elements": [{"type": "star", "content": more}, last]}


def _calls(form: Form, tools: Sequence[ForcedTool], parallel: bool, read: str = "") -> dict[str, Any]:
    """The format of calls. `read`, the marker, stands already: behind it comes a section, or a call without it."""
    if read and not form.begin:              # further calls have markers of their own, which trigger them
        return {"type": "or", "elements": [_tag(form, tool, read) for tool in tools]}
    elements: list[dict[str, Any]] = [{"type": "tags_with_separator", "tags": [_tag(form, tool) for tool in tools],
                                       "separator": form.separator, "at_least_one": True,
                                       "stop_after_first": form.single or not parallel}]
    if begin := form.begin.removeprefix(read):
        elements.insert(0, {"type": "const_string", "value": begin})
    if form.end:
        elements.append({"type": "const_string", "value": form.end})
    return {"type": "sequence", "elements": elements}


def _tag(form: Form, tool: ForcedTool, read: str = "") -> dict[str, Any]:
    """One call."""
    schema = arguments_schema(tool.schema)
    if form.style != "json" and not _fits_tags(schema):
        form = _JSON_IN_TAGS
    return {"type": "tag", "begin": form.before.replace(NAME, tool.name).removeprefix(read), "end": form.after,
            "content": {"type": "json_schema", "json_schema": schema, "style": form.style}}


def arguments_schema(schema: Mapping[str, Any]) -> dict[str, Any]:
    """`schema` as one of an object; where it names its properties and says no more, there are no others."""
    made = {**schema, "type": "object"}
    if "properties" in schema and not schema.keys() & {
            "additionalProperties", "patternProperties", "anyOf", "oneOf", "allOf", "$ref", "if", "unevaluatedProperties"}:
        made["additionalProperties"] = False
    return made


_PLAIN_KEYS = {"type", "properties", "required", "additionalProperties", "title", "description", "$defs", "definitions",
               "$schema", "strict"}
_TEXT_KEYS = {"const", "pattern", "format", "minLength", "maxLength"}


def _fits_tags(schema: Mapping[str, Any]) -> bool:
    """Whether arguments can be written as tags so that the parser reads what the schema means."""
    properties = schema.get("properties")
    if not isinstance(properties, dict) or not schema.keys() <= _PLAIN_KEYS:
        return False
    for name, value in properties.items():
        kind = value.get("type") if isinstance(value, dict) else None
        kinds = kind if isinstance(kind, list) else [kind]
        if None in kinds or set("<>\n") & set(name) or not name.strip() == name:
            return False
        if "string" in kinds and (kinds != ["string"] or value.keys() & _TEXT_KEYS or not _texts(value.get("enum"))):
            return False
    return True


def _texts(values: Any) -> bool:
    """Whether the values of an enumeration can stand between tags as they are."""
    return values is None or all(isinstance(text, str) and text and text == text.strip() and "<" not in text
                                 for text in values)


def answer_format(grammar: Grammar) -> Any:
    """A constraint of an answer as a format of a structural tag; None where it is none that can be combined."""
    kind, text = grammar.kind, grammar.text
    if kind == grammars.JSON_SCHEMA:
        return {"type": "json_schema", "json_schema": json.loads(text)}
    if kind == grammars.JSON_OBJECT:
        return {"type": "json_schema", "json_schema": {"type": "object"}}
    if kind == grammars.REGEX:
        return {"type": "regex", "pattern": text}
    if kind == grammars.CHOICE:
        return {"type": "or", "elements": [{"type": "const_string", "value": item} for item in json.loads(text)]}
    if kind in (grammars.LARK, grammars.EBNF):
        return {"type": "grammar", "grammar": text}
    tag = json.loads(text)
    return tag.get("format") if isinstance(tag, dict) else None
