"""The tools of a chat request: what is wrong with them, and what they mean for the template, the parser and the ids.

Names, schemas and limits are checked here, before anything is computed. Run by the frontend; pure functions.
"""
from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field

from frontend.fields import Body
from pipeline.config import ModelConfig
from pipeline.errors import QuartetError, invalid
from pipeline.families import forced
from pipeline.families.calls import is_name
from pipeline.families.table import FAMILIES, GENERIC
from pipeline.params import DetokSpec, Grammar, SamplingParams

MAX_TOOLS = 1024
MAX_NAME = 128
MAX_SIGNATURES = 256 * 1024                  # bytes: they travel with every choice
MAX_REFS = 16                                # references in a row
TYPES = frozenset(("string", "number", "integer", "boolean", "object", "array", "null"))


class Function(Body):
    """A function that the model may call."""

    name: Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="JSON Schema of an object")
    strict: bool | None = Field(None, description="arguments always fit the schema")


class Tool(Body):
    type: Literal["function"]
    function: Function


class FunctionName(Body):
    name: str


class NamedChoice(Body):
    """The one tool to call."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["function"]
    function: FunctionName


class Allowed(Body):
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedChoice], Field(min_length=1, max_length=MAX_TOOLS)]


class AllowedChoice(Body):
    """Some of the tools."""

    model_config = ConfigDict(extra="forbid")

    type: Literal["allowed_tools"]
    allowed_tools: Allowed


Tools = Annotated[list[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedChoice | AllowedChoice


@dataclass(slots=True, kw_only=True)
class ToolPlan:
    """What a request's tools come to."""

    tools: list[Tool] = field(default_factory=list)      # those that may be called
    required: bool = False
    parallel: bool = True
    tools_json: bytes = b""                  # for the template
    parser: str = ""
    signatures: bytes = b""

    def apply(self, sampling: SamplingParams, detok: DetokSpec) -> None:
        """Write what the tools mean into a request's parameters, whose grammar is that of the answer so far."""
        detok.tool_parser, detok.signatures = self.parser, self.signatures
        detok.max_calls = 1 if self.tools and not self.parallel else 0
        sampling.grammar = self._grammar(sampling.grammar)
        if sampling.grammar is not None and sampling.beam is not None:
            raise QuartetError("unsupported_parameter", "Calls that are required or strict are not supported together "
                                                        "with 'use_beam_search'.", "tool_choice")

    def _grammar(self, answer: Grammar | None) -> Grammar | None:
        strict = any(tool.function.strict for tool in self.tools)
        if not (self.required or strict or (answer is not None and self.parser)):
            return answer
        if self.parser not in forced.FORMS:
            if strict:
                raise QuartetError("unsupported_parameter", "Tools cannot be 'strict' with this model unless "
                                                            "'tool_choice' requires a call.", "tools")
            return answer
        tools = [forced.ForcedTool(tool.function.name, tool.function.parameters or {"properties": {}},
                                   bool(tool.function.strict)) for tool in self.tools]
        if self.required:
            return forced.required(self.parser, tools, self.parallel)
        if answer is not None and answer.closed:
            raise QuartetError("unsupported_parameter", "'disable_additional_properties' is not supported together with "
                                                        "tools that the model may call.", answer.param)
        made = forced.optional(self.parser, tools, self.parallel, answer and forced.answer_format(answer))
        made.whitespace = answer.whitespace if answer is not None else None
        return made


@dataclass(slots=True)
class CallIds:
    """Ids of the calls of one answer: unpredictable, and the same whoever writes the answer how often."""

    form: str                                # families.table.Family.ids
    before: int = 0                          # calls in the conversation so far
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16))

    def of(self, choice: int, number: int, name: str) -> str:
        """The id of call `number` of a choice."""
        if self.form == "kimi":
            return f"functions.{name}:{self.before + number}"
        digest = hashlib.blake2b(b"%d.%d" % (choice, number), key=self.key).hexdigest()
        return digest[:9] if self.form == "mistral" else f"call_{digest[:24]}"


def plan(tools: list[Tool] | None, choice: ToolChoice | None, parallel: bool, model: ModelConfig) -> ToolPlan:
    """QuartetError where tools or the choice among them cannot be used."""
    _check(tools or [])
    tools, mode = _chosen(tools or [], choice)
    if not tools or mode == "none":
        return ToolPlan()
    parser = model.tool_parser
    if mode == "required" and parser not in forced.FORMS:
        parser = GENERIC
    parallel = parallel and not isinstance(choice, NamedChoice)          # who names a tool wants that one call
    made = ToolPlan(tools=tools, required=mode == "required", parallel=parallel, tools_json=_template_json(tools),
                    parser=parser)
    if parser:
        made.signatures = _dump({
            tool.function.name: _types(tool.function.parameters) if FAMILIES[parser].typed else {} for tool in tools})
        if len(made.signatures) > MAX_SIGNATURES:
            raise invalid("The parameters of 'tools' have too many names.", "tools")
    return made


def for_template(tools: list[Tool] | None) -> bytes:
    """All tools for a template that is only rendered; QuartetError for what is wrong with them."""
    _check(tools or [])
    return _template_json(tools or [])


def _template_json(tools: list[Tool]) -> bytes:
    """Tools as templates expect them: every key is there, and none that is meant for the server."""
    return _dump([{"type": "function", "function": {
        "name": tool.function.name, "description": tool.function.description or "",
        "parameters": tool.function.parameters or {"type": "object", "properties": {}}}} for tool in tools]
    ) if tools else b""


def _chosen(tools: list[Tool], choice: ToolChoice | None) -> tuple[list[Tool], str]:
    """(the tools that may be called, none | auto | required)."""
    if choice is None or isinstance(choice, str):
        if choice == "required" and not tools:
            raise invalid("'tool_choice' needs 'tools'.", "tool_choice")
        return tools, choice or "auto"
    named = [choice] if isinstance(choice, NamedChoice) else choice.allowed_tools.tools
    wanted = [entry.function.name for entry in named]
    by_name = {tool.function.name: tool for tool in tools}
    for name in wanted:
        if name not in by_name:
            raise invalid(f"'tool_choice' names the tool '{name[:MAX_NAME]}', which is not in 'tools'.", "tool_choice")
    mode = "required" if isinstance(choice, NamedChoice) else choice.allowed_tools.mode
    return [by_name[name] for name in dict.fromkeys(wanted)], mode


def _check(tools: list[Tool]) -> None:
    seen: set[str] = set()
    for number, tool in enumerate(tools):
        name, where = tool.function.name, f"tools[{number}].function"
        if not is_name(name):
            raise invalid(f"'{where}.name' must consist of letters, digits and _-.:/$@.", f"{where}.name")
        if name in seen:
            raise invalid(f"The tool '{name}' is there twice.", f"{where}.name")
        seen.add(name)
        if tool.function.parameters:
            check_parameters(tool.function.parameters, f"{where}.parameters")


# ---- schemas -----------------------------------------------------------------------------------------------------

_SCHEMAS = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_STRINGS = ("pattern", "format", "$ref", "title", "description")


def check_parameters(schema: dict[str, Any], where: str) -> None:
    """QuartetError for the first keyword of a JSON Schema that has no meaning, and for one of no object."""
    if schema.get("type", "object") != "object":
        raise invalid(f"'{where}.type' must be 'object'.", where)
    waiting: list[tuple[Any, str]] = [(schema, where)]
    while waiting:
        value, path = waiting.pop()
        if not isinstance(value, bool):
            if not isinstance(value, dict):
                raise invalid(f"'{path[:300]}' must be a schema: an object, true or false.", where)
            _check_keywords(value, path[:300], where)
            waiting.extend(_below(value, path))


def _below(schema: Mapping[str, Any], path: str) -> Iterator[tuple[Any, str]]:
    for key in _SCHEMAS:
        if key in schema and not (key == "items" and isinstance(schema[key], list)):
            yield schema[key], f"{path}.{key}"
    for key in (*_LISTS, "items"):
        if isinstance(schema.get(key), list):
            yield from ((item, f"{path}.{key}[{n}]") for n, item in enumerate(schema[key]))
    for key in _MAPS:
        yield from ((item, f"{path}.{key}.{name}") for name, item in schema.get(key, {}).items())


def _check_keywords(schema: Mapping[str, Any], path: str, where: str) -> None:
    def need(key: str, fits: bool, what: str) -> None:
        if not fits:
            raise invalid(f"'{path}.{key}' must be {what}.", where)
    for key, value in schema.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if key == "type":
            kinds = value if isinstance(value, list) else [value]
            need(key, bool(kinds) and all(isinstance(kind, str) and kind in TYPES for kind in kinds),
                 "a type of JSON Schema or a list of such types")
        elif key in _MAPS:
            need(key, isinstance(value, dict), "an object of schemas")
        elif key in _LISTS:
            need(key, isinstance(value, list) and bool(value), "a list of schemas that is not empty")
        elif key == "required":
            need(key, isinstance(value, list) and all(isinstance(name, str) for name in value), "a list of strings")
        elif key == "enum":
            need(key, isinstance(value, list) and bool(value), "a list that is not empty")
        elif key in _COUNTS:
            need(key, number and value >= 0 and value == int(value), "a whole number that is not negative")
        elif key in _NUMBERS:
            need(key, number or (isinstance(value, bool) and key.startswith("exclusive")), "a number")
        elif key in _STRINGS:
            need(key, isinstance(value, str), "a string")


def _types(schema: Mapping[str, Any] | None) -> dict[str, str]:
    """Parameter -> its types, separated by "|"; "" where they are not declared."""
    found: dict[str, str] = {}
    for name, value in ((schema or {}).get("properties") or {}).items():
        types = _types_of(value, schema or {}, MAX_REFS)
        found[name] = "|".join(sorted(types)) if types < TYPES else ""
    return found


def _types_of(schema: Any, root: Mapping[str, Any], refs: int) -> set[str]:
    """The JSON types that a schema allows; all of them where it does not say."""
    if not isinstance(schema, dict):
        return set(TYPES)
    if isinstance(schema.get("$ref"), str):
        return _types_of(_resolved(schema["$ref"], root), root, refs - 1) if refs else set(TYPES)
    if "type" in schema:
        return set(schema["type"] if isinstance(schema["type"], list) else [schema["type"]])
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return set().union(*[_types_of(item, root, refs - 1) for item in schema[key]]) if refs else set(TYPES)
    values = schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else None
    return {_type_of(value) for value in values} if values else set(TYPES)


def _type_of(value: Any) -> str:
    names = {str: "string", bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}
    return names.get(type(value), "null")


def _resolved(reference: str, root: Mapping[str, Any]) -> Any:
    """What ``#/$defs/Name`` stands for; None for what is not there."""
    here: Any = root
    if not reference.startswith("#/"):
        return None
    for part in reference[2:].split("/"):
        here = here.get(part) if isinstance(here, dict) else None
    return here


def calls_in(messages: list[dict[str, Any]]) -> int:
    """Calls in a conversation so far."""
    return sum(len(calls) for message in messages if isinstance(calls := message.get("tool_calls"), list))


def _dump(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
