"""Constraints that cannot be honoured, as clients send them: each is a 400 that names its parameter."""
from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Body = dict[str, Any]

SCHEMAS: tuple[Any, ...] = (
    {"type": "foo"}, {"type": 5}, {"type": ["string", "nope"]}, {"type": {}}, {"type": ""},
    {"type": "object", "properties": []}, {"type": "object", "properties": {"a": 5}}, {"properties": "a"},
    {"type": "object", "properties": {"a": {"type": "strin"}}}, {"type": "object", "required": "a"},
    {"type": "object", "required": [5]}, {"type": "array", "items": 5}, {"type": "array", "items": "string"},
    {"type": "array", "prefixItems": {}}, {"type": "array", "minItems": "2"}, {"type": "array", "minItems": -1},
    {"type": "array", "minItems": 3, "maxItems": 1}, {"type": "array", "uniqueItems": True, "items": {"type": "integer"}},
    {"type": "array", "contains": {"type": "integer"}}, {"type": "string", "minLength": 5, "maxLength": 2},
    {"type": "string", "minLength": "x"}, {"type": "string", "pattern": "("}, {"type": "string", "pattern": "[a"},
    {"type": "string", "pattern": "a{2,1}"}, {"type": "string", "pattern": "(?=x)y"}, {"type": "string", "pattern": 5},
    {"type": "string", "pattern": r"(a)\1"}, {"type": "string", "pattern": "*a"}, {"type": "string", "format": "foo"},
    {"type": "string", "format": 7}, {"type": "string", "format": "uuid", "maxLength": 3},
    {"type": "integer", "minimum": 5, "maximum": 1}, {"type": "integer", "minimum": "5"},
    {"type": "number", "multipleOf": "x"}, {"type": "number", "multipleOf": -1}, {"type": "integer", "minimum": 1.2,
                                                                                "maximum": 1.8},
    {"const": 1, "type": "string"}, {"enum": []}, {"enum": "a"}, {"enum": [1], "type": "string"}, {"anyOf": []},
    {"anyOf": {}}, {"anyOf": [5]}, {"anyOf": [{"type": "nope"}]}, {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"allOf": "x"}, {"not": {"type": "string"}}, {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"type": "object", "propertyNames": {"pattern": "^a", "maxLength": 2}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "object", "unevaluatedProperties": False}, {"type": "object", "minProperties": "x"},
    {"type": "object", "patternProperties": {"(": {}}}, {"type": "object", "patternProperties": {"^a": {}, "^ab": {}}},
    {"type": "object", "properties": {"a": False}, "required": ["a"]}, {"$ref": "#/nope"}, {"$ref": "http://x/y"},
    {"$ref": "file:///etc/passwd"}, {"$ref": 5}, {"$ref": "#/$defs/a", "$defs": {"a": {"type": "nope"}}},
    {"type": "array", "items": {"$ref": "#/$defs/missing"}, "$defs": {}},
    {"oneOf": [{"type": "string"}, {"minLength": 3}]}, {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    {"oneOf": [{"enum": [1, 2]}, {"enum": [2, 3]}]}, {"oneOf": [{"type": "object"}, {"type": "object"}]},
    {"oneOf": "x"}, {"oneOf": []}, {"additionalProperties": 7, "type": "object"}, {"type": "null", "const": 3},
    False, {"type": "string", "maxLength": -1}, {"type": "object", "properties": {"a": {"enum": {}}}})
REGEXES = (
    "(", ")", "[", "[a", "*", "+a", "?", "a{2,1}", "a{,", "(?", "(?P<", "(?=a)b", "(?!a)b", "(?<=a)b", "(?<!a)b",
    r"(a)\1", r"(?P<x>a)(?P=x)", r"\b", r"a\B", r"\p{Nope}", r"\x", r"\u12", "[z-a]", "a" + "(" * 400,
    "(" * 30000 + "a" + ")" * 30000, "\0", "a\0b", "(a{1000}){1000}{1000}{1000}(?=x)", r"\8", "(?z)a", "a|*", "[]")
GRAMMARS = (
    "start: foo", "start", "s: \"a\"", "start: \"a", "start: /a", "start: (\"a\"", "start: \"a\"\nstart: \"b\"",
    "start: a\na: b\nb: c", "%import nothing.at.all\nstart: X", "start: \"a\"{3,1}", "start: /(?=a)/", "start: %json {",
    "start: %json {\"type\": \"foo\"}", "start: @missing", "start: " + "(" * 5000 + "\"a\"" + ")" * 5000, "???", "\0",
    "root ::= foo", "::=", "root ::= \"a", "root ::= (", "root ::= )", "x ::= \"a\"", "root ::= \"a\"\nroot ::= \"b\"",
    "root ::= [a", "root ::= []", "root ::= \"a\"{3,1}", "root ::= \"\\uD800\"", "root ::= \"\\U00110000\"",
    "root ::= [z-a]", "root ::= " + "(" * 5000 + "\"a\"" + ")" * 5000, "root ::= \"a\" |* \"b\"", "root ::= ** \"a\"",
    "root ::= \"a\" ;", "1root ::= \"a\"")
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": {}}, "end": "</a>"}
FORMATS: tuple[Any, ...] = (
    {}, {"type": "nope"}, {"type": 5}, {"type": "const_string"}, {"type": "const_string", "value": 5},
    {"type": "json_schema", "json_schema": {"type": "foo"}}, {"type": "json_schema", "json_schema": 5},
    {"type": "json_schema", "json_schema": {}, "style": "nope"}, {"type": "regex"}, {"type": "regex", "pattern": "("},
    {"type": "grammar", "grammar": "root ::= ("}, {"type": "grammar", "grammar": "start: foo"}, {"type": "sequence"},
    {"type": "sequence", "elements": []}, {"type": "sequence", "elements": [5]}, {"type": "or", "elements": []},
    {"type": "sequence", "elements": [{"type": "any_text"}, {"type": "regex", "pattern": "a"}]}, {**TAG, "begin": 5},
    {**TAG, "end": 5}, {**TAG, "end": [5]}, {**TAG, "content": None}, {"type": "any_text", "excludes": ["x"]},
    {"type": "triggered_tags", "triggers": [], "tags": [TAG]}, {"type": "triggered_tags", "triggers": ["<b"], "tags": [TAG]},
    {"type": "triggered_tags", "triggers": ["<a"], "tags": []}, {"type": "triggered_tags", "triggers": "<a", "tags": [TAG]},
    {"type": "tags_with_separator", "tags": [], "separator": ""},
    {"type": "tags_with_separator", "tags": [TAG], "separator": 5}, {"type": "optional"},
    {"type": "repeat", "content": TAG, "min": 3, "max": 1}, {"type": "repeat", "content": TAG, "min": "x"},
    {"type": "repeat", "content": TAG, "min": 0, "max": 10**9},
    {"type": "qwen_xml_parameter", "json_schema": {"properties": 5}})


def deep(levels: int) -> Any:
    value: Any = {"type": "integer"}
    for _ in range(levels):
        value = {"type": "array", "items": value}
    return value


def generated(seed: int, count: int) -> Iterator[Any]:
    """Good schemas with one value of the wrong type or an impossible one somewhere inside."""
    draw = random.Random(seed)
    faults = [fault for fault in SCHEMAS if isinstance(fault, dict) and "$ref" not in fault]
    for _ in range(count):
        schema: Any = draw.choice(faults)
        for _ in range(draw.randrange(1, 5)):
            schema = draw.choice((
                {"type": "object", "properties": {"a": {"type": "string"}, "b": schema}, "required": ["b"]},
                {"type": "array", "items": schema, "minItems": 1}, {"allOf": [{"title": "x"}, schema]},
                {"type": "array", "prefixItems": [{"type": "null"}, schema], "minItems": 2}))
        yield schema


def bodies() -> Iterator[tuple[str, Body]]:
    """(the parameter that an error must begin with, fields of a request)"""
    for n, schema in enumerate((*SCHEMAS, *generated(1, 60))):
        if n % 3 == 0:
            yield "structured_outputs.json", {"structured_outputs": {"json": schema}}
        elif n % 3 == 1:
            yield "guided_json", {"guided_json": schema}
        else:
            yield "response_format", {"response_format": {
                "type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}
    yield "response_format", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": deep(80)}}}
    for n, regex in enumerate(REGEXES):
        yield ("guided_regex", {"guided_regex": regex}) if n % 2 else (
            "structured_outputs.regex", {"structured_outputs": {"regex": regex}})
    for n, grammar in enumerate(GRAMMARS):
        yield ("guided_grammar", {"guided_grammar": grammar}) if n % 2 else (
            "structured_outputs.grammar", {"structured_outputs": {"grammar": grammar}})
    for form in FORMATS:
        yield "response_format", {"response_format": {"type": "structural_tag", "format": form}}


# What the frontend sees by itself: (parameter, fields).
SHAPES: tuple[tuple[str, Body], ...] = (
    ("response_format", {"response_format": "json"}), ("response_format", {"response_format": []}),
    ("response_format.type", {"response_format": {}}), ("response_format.type", {"response_format": {"type": "xml"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": 5}}),
    ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}),
    ("response_format.json_schema", {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 5}}}),
    ("response_format", {"response_format": {"type": "structural_tag"}}),
    ("response_format", {"response_format": {"type": "structural_tag", "structures": []}}),
    ("response_format.structures", {"response_format": {"type": "structural_tag", "structures": 5, "triggers": []}}),
    ("structured_outputs", {"structured_outputs": {}}), ("structured_outputs", {"structured_outputs": 5}),
    ("structured_outputs", {"structured_outputs": {"json": {}, "regex": "a"}}),
    ("structured_outputs", {"structured_outputs": {"disable_any_whitespace": True}}),
    ("structured_outputs.json", {"structured_outputs": {"json": 5}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "{"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "[1]"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "{\"minimum\": NaN}"}}),
    ("structured_outputs.json", {"structured_outputs": {"json": "[" * 100000}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": ""}}),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "a" * 300000}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": []}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": "ab"}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": [1]}}),
    ("structured_outputs.choice", {"structured_outputs": {"choice": ["x" * 100] * 9000}}),
    ("structured_outputs.grammar", {"structured_outputs": {"grammar": ""}}),
    ("structured_outputs.json_object", {"structured_outputs": {"json_object": False}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "{"}}),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": 5}}),
    ("structured_outputs.whitespace_pattern", {"structured_outputs": {"json": {}, "whitespace_pattern": "a"}}),
    ("structured_outputs.whitespace_pattern", {"structured_outputs": {"json": {}, "whitespace_pattern": "[^x]"}}),
    ("structured_outputs.whitespace_pattern", {"structured_outputs": {
        "json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}}),
    ("guided_choice", {"guided_choice": [5]}), ("guided_regex", {"guided_regex": "a", "guided_json": {}}),
    ("guided_json", {"guided_json": {}, "structured_outputs": {"regex": "a"}}),
    ("guided_whitespace_pattern", {"guided_whitespace_pattern": " "}),
    ("guided_whitespace_pattern", {"guided_json": {}, "guided_whitespace_pattern": "."}),
    ("response_format", {"response_format": {"type": "json_object"}, "guided_regex": "a"}))
