"""Schemas as pydantic and zod write them: what `jsonschema` says of a value, the grammar says too."""
from __future__ import annotations

import enum
import json
import uuid
from typing import Annotated, Any, Literal

import jsonschema
import pytest
from llguidance import LLMatcher, LLTokenizer
from pydantic import UUID4, Base64Str, Field, FilePath, SecretStr, TypeAdapter

from pipeline import grammars
from pipeline.errors import QuartetError
from tests.detok_proc import zoo
from tokenizer_proc.generated import MAX_DISTINCT
from tokenizer_proc.grammar import compiled
from tokenizer_proc.grammar_check import check

TOKENIZER = zoo.byte_level()


class Color(enum.Enum):
    RED, BLUE = "red", "blue"


@pytest.fixture(scope="module")
def vocabulary() -> Any:
    return LLTokenizer(TOKENIZER.to_str(), eos_token=[zoo.token(TOKENIZER, "</s>")])


def text_of(schema: Any) -> str:
    """What the library gets; a QuartetError or an AssertionError with its complaint where it cannot be used."""
    made = compiled(grammars.json_schema(schema), TOKENIZER, [5]).text
    assert check(made) == "", check(made)
    return made


def accepts(vocabulary: Any, schema: Any, value: Any) -> bool:
    matcher = LLMatcher(vocabulary, text_of(schema))
    ids = TOKENIZER.encode(json.dumps(value, separators=(",", ":"), ensure_ascii=False)).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


OBJECTS = [{}, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}, {"c": 3}, {"a": 1, "c": 3}, {"red": 1}, {"red": 1, "blue": 2}, {"a": "x"},
           {"xa": 1}, {"xa": "s"}, {"abcd": 1}, {"": 1}, {"é\n": 4}]
ARRAYS = [[], ["a"], ["b", "a"], ["a", "b", "c"], ["c", "b", "a"], ["a", "a"], ["a", "b", "a"], ["d"], ["red"], ["blue", "red"],
          ["red", "red"], [1, True], [1, 1], [True, 1], [True, True], "a", {}]
SCHEMAS: list[tuple[Any, list[Any]]] = [
    (TypeAdapter(dict[Literal["a", "b"], int]).json_schema(), OBJECTS),
    (TypeAdapter(dict[Color, int]).json_schema(), OBJECTS),
    (TypeAdapter(dict[Annotated[str, Field(min_length=1, max_length=3)], int]).json_schema(), OBJECTS),
    (TypeAdapter(dict[Annotated[str, Field(pattern="^x")], int]).json_schema(), OBJECTS),
    # zod: z.record() of any names, of an enum, z.partialRecord(), and z.never()
    ({"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}}, OBJECTS),
    ({"type": "object", "propertyNames": {"type": "string", "enum": ["a", "b"]}, "additionalProperties": {"type": "number"},
      "required": ["a", "b"]}, OBJECTS),
    ({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"not": {}}}}, OBJECTS[:4]),
    ({"type": "object", "properties": {"a": {"type": "string"}, "c": {}}, "propertyNames": {"enum": ["a", "b"]},
      "additionalProperties": {"type": "integer"}}, OBJECTS),
    ({"type": "object", "propertyNames": {"const": "a"}, "additionalProperties": False}, OBJECTS),
    ({"type": "object", "propertyNames": {"pattern": "^[ab]$"}, "minProperties": 1}, OBJECTS),
    ({"type": "object", "propertyNames": True, "additionalProperties": {"type": "integer"}}, OBJECTS),
    (TypeAdapter(set[Literal["a", "b", "c"]]).json_schema(), ARRAYS),
    (TypeAdapter(Annotated[set[Literal["a", "b", "c"]], Field(min_length=2, max_length=2)]).json_schema(), ARRAYS),
    (TypeAdapter(frozenset[Color]).json_schema(), ARRAYS),
    ({"type": "array", "uniqueItems": True, "items": {"enum": [1, True, 1]}}, ARRAYS),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, ARRAYS),
    ({"type": "array", "uniqueItems": False, "items": {"type": "string"}}, ARRAYS),
    # zod's formats are names of the patterns beside them
    ({"type": "string", "format": "nanoid", "pattern": "^[a-z]{3}$"}, ["abc", "ab", "abcd", 5]),
    ({"type": "string", "format": "ends_with", "allOf": [{"pattern": "^ab.*"}, {"pattern": ".*c$"}]}, ["abc", "ab", "c"]),
]


@pytest.mark.parametrize(("schema", "values"), SCHEMAS)
def test_the_grammar_takes_what_is_valid(vocabulary: Any, schema: Any, values: list[Any]) -> None:
    found = {json.dumps(value): accepts(vocabulary, schema, value) for value in values}
    valid = {json.dumps(value): jsonschema.Draft202012Validator(schema).is_valid(value) for value in values}
    assert found == valid and True in valid.values() and False in valid.values()


@pytest.mark.parametrize(("kind", "good", "bad"), [
    (UUID4, str(uuid.UUID(int=0x12345678123442348234123412341234)), "12345678-1234-1234-8234-123412341234"),
    (Base64Str, "YWJjZA==", "YWJjZA"), (SecretStr, "x", 5), (FilePath, "/a/b", None)])
def test_formats_of_pydantic(vocabulary: Any, kind: Any, good: Any, bad: Any) -> None:
    schema = TypeAdapter(kind).json_schema()
    assert accepts(vocabulary, schema, good) and not accepts(vocabulary, schema, bad)


@pytest.mark.parametrize(("schema", "word"), [
    (TypeAdapter(set[str]).json_schema(), "uniqueItems"),
    ({"type": "array", "uniqueItems": True, "items": {"enum": list(range(MAX_DISTINCT + 1))}}, "uniqueItems"),
    ({"type": "object", "properties": {"a": {}}, "propertyNames": {"pattern": "^a"}}, "propertyNames"),
    ({"type": "object", "propertyNames": {"pattern": "^a", "maxLength": 2}}, "propertyNames"),
    ({"type": "string", "format": "jwt"}, "jwt"), ({"not": {"type": "string"}}, "not"), ({"not": {}}, "nothing")])
def test_what_cannot_be_said_is_refused_by_name(schema: Any, word: str) -> None:
    with pytest.raises((QuartetError, AssertionError), match=word):
        text_of(schema)
