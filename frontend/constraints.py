"""What constrains an answer: `response_format`, `structured_outputs` and the deprecated `guided_*`, as one Grammar record.

Run by the frontend; pure functions and schemas. Checks what is cheap (types, sizes, that exactly one constraint is asked
for); the tokenizer checks what a schema or a grammar means before the engine hears of it.
"""
from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, NoReturn

from pydantic import ConfigDict, Field

from frontend.fields import Body
from pipeline import grammars
from pipeline.errors import QuartetError, invalid
from pipeline.grammars import MAX_CHOICES, MAX_GRAMMAR_BYTES
from pipeline.params import Grammar

MAX_WHITESPACE = 128
_BLANK = re.compile(r"\\(?:[snrt]|x20|x09|x0[aAdD])|\{\d{1,4}(?:,\d{0,4})?\}|[ \t\n\r\[\]()|?*+]|\(\?:")

GrammarText = Annotated[str, Field(min_length=1, max_length=MAX_GRAMMAR_BYTES)]
Choices = Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
Schema = dict[str, Any] | bool | Annotated[str, Field(max_length=MAX_GRAMMAR_BYTES)]
Whitespace = Annotated[str, Field(max_length=MAX_WHITESPACE)]


class JsonSchemaFormat(Body):
    """`response_format.json_schema`. The schema always holds; `strict: false` allows properties that it does not name."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    json_schema: dict[str, Any] | bool | None = Field(None, alias="schema", description="a JSON Schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """`response_format`."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    format: dict[str, Any] | None = Field(None, description="structural_tag: a tree of formats")
    structures: list[dict[str, Any]] | None = Field(None, description="structural_tag: begin, schema, end of each")
    triggers: list[str] | None = None


class StructuredOutputs(Body):
    """`structured_outputs`: exactly one of the first six."""

    model_config = ConfigDict(populate_by_name=True)

    json_: Schema | None = Field(None, alias="json", description="a JSON Schema, as an object or as text")
    regex: GrammarText | None = None
    choice: Choices | None = None
    grammar: GrammarText | None = Field(None, description="EBNF with a rule 'root', or Lark with a rule 'start'")
    json_object: Literal[True] | None = None
    structural_tag: GrammarText | dict[str, Any] | None = None
    whitespace_pattern: Whitespace | None = Field(None, description="regex of the white space between JSON tokens")
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None


class Constrained(Body):
    """The fields of a body that constrain its answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = Field(None, description="deprecated: structured_outputs.json")
    guided_regex: GrammarText | None = Field(None, description="deprecated: structured_outputs.regex")
    guided_choice: Choices | None = Field(None, description="deprecated: structured_outputs.choice")
    guided_grammar: GrammarText | None = Field(None, description="deprecated: structured_outputs.grammar")
    guided_whitespace_pattern: Whitespace | None = Field(
        None, description="deprecated: structured_outputs.whitespace_pattern")


def grammar_of(body: Constrained) -> Grammar | None:
    """What constrains the answer; None when nothing does. QuartetError where two things do."""
    wanted = _response_format(body.response_format)
    other = _structured(body.structured_outputs)
    guided = _guided(body)
    if other is not None and guided is not None:
        raise invalid(f"'{guided.param}' cannot be used together with 'structured_outputs'.", guided.param)
    other = other or guided
    if wanted is not None and other is not None and wanted.kind != other.kind:
        raise invalid(f"'response_format' and '{other.param}' ask for different constraints.", "response_format")
    grammar = wanted or other
    if grammar is not None:
        if wanted is not None and other is not None:
            grammar.whitespace, grammar.closed, grammar.open = other.whitespace, other.closed, other.open
        if len(grammar.text.encode("utf-8", "surrogatepass")) > MAX_GRAMMAR_BYTES:
            raise invalid(f"'{grammar.param}' is larger than {MAX_GRAMMAR_BYTES} bytes.", grammar.param)
    return grammar


def _response_format(form: ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return grammars.json_object()
    if form.type == "json_schema":
        if form.json_schema is None:
            raise QuartetError("invalid_request", "The parameter 'response_format.json_schema' is required.",
                               "response_format.json_schema")
        schema = form.json_schema.json_schema
        additional = True if form.json_schema.strict is False else None
        return grammars.json_schema(_schema({} if schema is None else schema, "response_format"), additional=additional)
    if form.format is None and (form.structures is None or form.triggers is None):
        raise invalid("A 'response_format' of type 'structural_tag' needs 'format', or 'structures' and 'triggers'.",
                      "response_format")
    if form.format is not None:
        return grammars.structural_tag(form.format)
    return Grammar(grammars.STRUCTURAL_TAG, grammars.dump({
        "type": "structural_tag", "structures": form.structures, "triggers": form.triggers}))


def _structured(form: StructuredOutputs | None) -> Grammar | None:
    if form is None:
        return None
    given = {name: value for name, value in (
        ("json", form.json_), ("regex", form.regex), ("choice", form.choice), ("grammar", form.grammar),
        ("json_object", form.json_object), ("structural_tag", form.structural_tag)) if value is not None}
    if len(given) != 1:
        raise invalid("'structured_outputs' needs exactly one of 'json', 'regex', 'choice', 'grammar', 'json_object' and "
                      "'structural_tag'.", "structured_outputs")
    (name, value), = given.items()
    whitespace = form.whitespace_pattern
    if form.disable_any_whitespace:
        if whitespace:
            raise invalid("'structured_outputs.whitespace_pattern' contradicts 'disable_any_whitespace'.",
                          "structured_outputs.whitespace_pattern")
        whitespace = ""
    return _grammar(name, value, f"structured_outputs.{name}", whitespace, "structured_outputs.whitespace_pattern",
                    None if form.disable_additional_properties is None else not form.disable_additional_properties)


def _guided(body: Constrained) -> Grammar | None:
    given = {name: value for name, value in (
        ("json", body.guided_json), ("regex", body.guided_regex), ("choice", body.guided_choice),
        ("grammar", body.guided_grammar)) if value is not None}
    whitespace = body.guided_whitespace_pattern
    if not given:
        if whitespace is not None:
            raise invalid("'guided_whitespace_pattern' needs 'guided_json'.", "guided_whitespace_pattern")
        return None
    if len(given) > 1:
        raise invalid("Only one of the 'guided_' parameters can be used.", f"guided_{list(given)[1]}")
    (name, value), = given.items()
    return _grammar(name, value, f"guided_{name}", whitespace, "guided_whitespace_pattern")


def _grammar(name: str, value: Any, param: str, whitespace: str | None, whitespace_param: str,
             additional: bool | None = None) -> Grammar:
    if whitespace is not None and _BLANK.sub("", whitespace):
        raise invalid(f"'{whitespace_param}' must be a regular expression of white space.", whitespace_param)
    if name == "json":
        grammar = grammars.json_schema(_schema(value, param), whitespace, additional)
    elif name == "json_object":
        grammar = grammars.json_object(whitespace)
    elif name == "choice":
        grammar = grammars.choice(value)
    elif name == "grammar":
        grammar = grammars.context_free(value)
    elif name == "regex":
        grammar = Grammar(grammars.REGEX, value)
    else:
        tag = _parsed(value, param) if isinstance(value, str) else value
        grammar = Grammar(grammars.STRUCTURAL_TAG, grammars.dump(tag), whitespace=whitespace)
    grammar.param = param
    return grammar


def _schema(value: Any, param: str) -> Any:
    schema = _parsed(value, param) if isinstance(value, str) else value
    if not isinstance(schema, (dict, bool)):
        raise invalid(f"'{param}' must be a JSON schema, which is an object.", param)
    return schema


def _parsed(text: str, param: str) -> Any:
    if len(text) > MAX_GRAMMAR_BYTES:
        raise invalid(f"'{param}' is larger than {MAX_GRAMMAR_BYTES} bytes.", param)
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise invalid(f"'{param}' is not valid JSON.", param) from None


def _refuse(name: str) -> NoReturn:
    raise ValueError(name)
