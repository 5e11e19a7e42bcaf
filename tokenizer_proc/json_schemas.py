"""JSON Schemas of users, made ready for the grammar library: bounded, with our white space, without what it misreads.

Run by the tokenizer. What a schema means is never loosened: `oneOf` becomes `anyOf` only where its branches cannot both
hold, and what is not understood is refused by name (here or by the library).
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tokenizer_proc.generated import resolve, understood

MAX_DEPTH = 64
MAX_NODES = 50_000
# Between two tokens of JSON: a space or two, or a line break with its indentation. Never without an end.
WHITESPACE = r"[ \t]{1,2}|\r?\n[ \t]{0,32}"
_ONE = ("items", "additionalProperties", "additionalItems", "not", "if", "then", "else", "contains", "propertyNames",
        "unevaluatedProperties", "unevaluatedItems")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_JOINING = frozenset(("if", "dependentSchemas", "unevaluatedProperties"))
_BRANCHES = frozenset(("anyOf", "oneOf", "allOf", "$ref"))
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "string", "integer"))
Schema = dict[str, Any]


class Unusable(Exception):
    """A grammar that cannot be used; the text is a sentence for its user."""


def check_size(value: Any) -> None:
    """Unusable for JSON that is nested too deep or has too many parts."""
    level, depth, nodes = [value], 0, 0
    while level:
        depth += 1
        below: list[Any] = []
        for item in level:
            below.extend(item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
        nodes += len(below)
        if depth > MAX_DEPTH + 1:
            raise Unusable(f"The JSON schema is nested deeper than {MAX_DEPTH} levels.")
        if nodes > MAX_NODES:
            raise Unusable(f"The JSON schema has more than {MAX_NODES} parts.")
        level = below


def prepare(schema: Any, whitespace: str | None, closed: bool = False, open_: bool = False) -> Schema:
    """A schema for the library, with our options. Unusable where it cannot be honoured.

    Objects that name their properties and say nothing of others have no others (a model would add them for ever): always
    if `closed`, never if `open_`, else unless the schema puts objects together (`joins`), which closing could empty.
    """
    check_size(schema)
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise Unusable("A JSON schema must be an object.")
    options: dict[str, Any] = {"whitespace_flexible": False}
    if whitespace != "":
        options = {"whitespace_pattern": WHITESPACE if whitespace is None else whitespace}
    closed = closed or not open_ and not joins(schema)
    made = _rewritten(schema, schema, closed)
    if not isinstance(made, dict):
        raise Unusable("The JSON schema allows nothing.")
    return {**made, "x-guidance": options}


def joins(schema: Any) -> bool:
    """Whether any object of `schema` is to be valid under several parts, each of which names properties."""
    level = [schema]
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                parts = item.get("allOf")
                if isinstance(parts, list) and len(parts) > 1 or item.keys() & _JOINING or (
                        "properties" in item and item.keys() & _BRANCHES) or len(item.keys() & _BRANCHES) > 1:
                    return True
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        level = below
    return False


def _rewritten(schema: Any, root: Schema, closed: bool) -> Any:
    if not isinstance(schema, dict):
        return schema                        # true, false, or what the library will refuse
    made = understood({key: value for key, value in schema.items() if key != "x-guidance"}, root)
    if not isinstance(made, dict):
        return made
    for key in _ONE:
        if isinstance(made.get(key), dict):
            made[key] = _rewritten(made[key], root, closed)
    for key in _MANY:
        if isinstance(made.get(key), list):
            made[key] = [_rewritten(item, root, closed) for item in made[key]]
    for key in _NAMED:
        if isinstance(made.get(key), dict):
            made[key] = {name: _rewritten(item, root, closed) for name, item in made[key].items()}
    named = made.get("properties")
    if closed and isinstance(named, dict) and {*_strings(made.get("required"))} <= named.keys():
        made.setdefault("additionalProperties", False)
    multiple = made.get("multipleOf", 1)
    if isinstance(multiple, (int, float)) and multiple <= 0:
        raise Unusable("'multipleOf' of a JSON schema must be above 0.")
    branches = made.get("oneOf")
    if isinstance(branches, list):
        if not disjoint(branches, root):
            raise Unusable("The JSON schema uses 'oneOf' with branches that may hold together; use 'anyOf', or give each "
                           "branch a type or a required constant of its own.")
        del made["oneOf"]
        if "anyOf" in made:
            made["allOf"] = [*made.get("allOf", []), {"anyOf": branches}]
        else:
            made["anyOf"] = branches
    return made


def disjoint(branches: list[Any], root: Schema) -> bool:
    """Whether no value can be valid under two of `branches`: they differ in type, or in a required constant."""
    resolved = [resolve(branch, root) for branch in branches]
    return all(isinstance(branch, dict) for branch in resolved) and all(
        _apart(one, other, root) for i, one in enumerate(resolved) for other in resolved[:i])


def _apart(one: Schema, other: Schema, root: Schema) -> bool:
    if not _kinds(one) & _kinds(other):
        return True
    values = _values(one), _values(other)
    if all(values) and not values[0] & values[1]:
        return True
    if _kinds(one) | _kinds(other) != {"object"}:
        return False
    for name in {*_strings(one.get("required"))} & {*_strings(other.get("required"))}:
        found = [_values(resolve(_property(branch, name), root)) for branch in (one, other)]
        if all(found) and not found[0] & found[1]:
            return True
    return False


def _kinds(schema: Schema) -> set[str]:
    kind = schema.get("type")
    kinds = set(_strings([kind] if isinstance(kind, str) else kind)) & _TYPES
    return ({"number" if k == "integer" else k for k in kinds}) or set(_TYPES - {"integer"})


def _values(schema: Any) -> set[str]:
    """What a schema's constants are, typed; empty without any."""
    if not isinstance(schema, dict):
        return set()
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(values, list):
        return set()
    return {f"{type(value).__name__}:{value}" if isinstance(value, (str, bool)) else f"number:{float(value)}"
            if isinstance(value, (int, float)) else f"json:{value}" for value in values}


def _property(schema: Schema, name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name) if isinstance(properties, dict) else None


def _strings(values: Any) -> Iterator[str]:
    items: Iterable[Any] = values if isinstance(values, list) else ()
    return (item for item in items if isinstance(item, str))
