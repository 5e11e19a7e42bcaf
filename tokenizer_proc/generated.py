"""What pydantic, zod and OpenAPI tools write into JSON Schemas and the grammar library lacks, said in words that it has.

Run by the tokenizer. Never looser than what the user wrote, and narrower in formats only, which are notes by themselves.
What cannot be said so stays as it is, for the library to refuse by name.
"""
from __future__ import annotations

import itertools
from typing import Any

Schema = dict[str, Any]
MAX_DISTINCT = 5                 # values of which every order is written out: 326 arrays
# The formats of the library. Another one beside a pattern is the pattern's name (zod), by itself a word or a pattern.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
WORDS = frozenset(("password", "binary", "path", "file-path", "directory-path"))         # of any text
BASE64 = "^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$"
PATTERNS = {"base64": BASE64, "byte": BASE64, **{
    f"uuid{version}": f"^[0-9a-f]{{8}}-[0-9a-f]{{4}}-{version}[0-9a-f]{{3}}-[89ab][0-9a-f]{{3}}-[0-9a-f]{{12}}$"
    for version in "134567"}}


def resolve(schema: Any, root: Schema) -> Any:
    """`schema` behind its local references, a few of them."""
    for _ in range(8):
        if not isinstance(schema, dict) or not isinstance(schema.get("$ref"), str):
            break
        target: Any = root
        for part in schema["$ref"].removeprefix("#").strip("/").split("/"):
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, dict) else None
        schema = target
    return schema


def understood(schema: Schema, root: Schema) -> Schema | bool:
    """`schema`, which is not changed, with those of its own keywords rewritten that can be."""
    made = dict(schema)
    if made.get("not") in ({}, True) and isinstance(made["not"], (dict, bool)):
        return False                                     # zod's never
    if made.get("uniqueItems") is not None:
        _distinct(made, root)
    if "propertyNames" in made:
        _names(made, root)
    if isinstance(made.get("format"), str):
        _format(made)
    return made


def _format(made: Schema) -> None:
    name, parts = made["format"], made.get("allOf")
    described = "pattern" in made or (isinstance(parts, list) and any(
        isinstance(part, dict) and "pattern" in part for part in parts))
    if name in FORMATS:
        return
    if described or name in WORDS:
        del made["format"]
    elif name in PATTERNS:
        made["pattern"] = PATTERNS[made.pop("format")]
    elif name == "url":
        made["format"] = "uri"


def _names(made: Schema, root: Schema) -> None:
    """`propertyNames` of a few names become properties; of a form, patterns of properties."""
    names, others = resolve(made["propertyNames"], root), made.get("additionalProperties", True)
    if names is True or names == {} and isinstance(names, dict):
        del made["propertyNames"]
        return
    if not isinstance(names, dict) or names.get("type", "string") != "string" or "patternProperties" in made:
        return
    given = made.get("properties", {})
    rules = names.keys() - {"type", "title", "description"}
    allowed = [names["const"]] if rules == {"const"} else names.get("enum") if rules == {"enum"} else None
    if not rules:
        del made["propertyNames"]
    elif isinstance(allowed, list) and isinstance(given, dict):
        made["properties"] = {name: given.get(name, others) for name in allowed if isinstance(name, str)}
        made["additionalProperties"] = False
        del made["propertyNames"]
    elif not given and (form := _form(names, frozenset(rules))):
        made["patternProperties"], made["additionalProperties"] = {form: others}, False
        del made["propertyNames"]


def _form(names: Schema, rules: frozenset[str]) -> str | None:
    """The pattern of a name with `pattern`, or with bounds of its length; None where both or others are asked for."""
    if rules == {"pattern"} and isinstance(names["pattern"], str):
        return str(names["pattern"])
    low, high = names.get("minLength", 0), names.get("maxLength", "")
    if rules <= {"minLength", "maxLength"} and isinstance(low, int) and (high == "" or isinstance(high, int)):
        return rf"^[\s\S]{{{low},{high}}}$"
    return None


def _distinct(made: Schema, root: Schema) -> None:
    """Arrays of distinct values out of a few: every order of every choice of them."""
    most = made.get("maxItems")
    if made["uniqueItems"] is False or isinstance(most, int) and most <= 1:
        del made["uniqueItems"]
        return
    items = resolve(made.get("items"), root)
    if made["uniqueItems"] is not True or not isinstance(items, dict) or made.get("type") != "array" \
            or "prefixItems" in made or "anyOf" in made:
        return
    if items.keys() - {"type", "title", "description", "enum", "const"}:
        return
    values = [items["const"]] if "const" in items else items.get("enum")
    if not isinstance(values, list) or not all(isinstance(value, (str, int)) for value in values):
        return
    values = list({(isinstance(value, bool), value): value for value in values}.values())
    least, most = made.get("minItems", 0), len(values) if most is None else most
    if len(values) > MAX_DISTINCT or not isinstance(least, int) or not isinstance(most, int):
        return
    kind = {"type": items["type"]} if "type" in items else {}
    made["anyOf"] = [
        {"type": "array", "prefixItems": [{**kind, "const": value} for value in some], "items": False,
         "minItems": size, "maxItems": size}
        for size in range(max(0, least), min(len(values), most) + 1) for some in itertools.permutations(values, size)]
    for key in ("uniqueItems", "items", "minItems", "maxItems", "type"):
        made.pop(key, None)
