"""Random JSON schemas of every keyword that this server takes, for tests that let a random model answer them."""
from __future__ import annotations

import random
from typing import Any

NAMES = ("a", "b", "name", "größe", "x y", "id_1", 'q"uote', "list")
FORMATS = ("date", "uuid", "ipv4", "email", "date-time")


class Schemas:
    """A seeded source. Most values are short by themselves, so that most answers come to an end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self, depth: int = 3) -> Any:
        draw = self._random
        kinds = [self._integer, self._number, self._string, self._enum, self._const, self._plain]
        if depth:
            kinds += [self._object, self._object, self._array, self._any_of, self._one_of, self._all_of, self._reference]
        made = draw.choice(kinds)(depth - 1)
        if draw.random() < 0.2:
            made = {**made, "title": "T", "description": "what it is"}
        return made

    def _plain(self, depth: int) -> Any:
        kind = self._random.choice((["boolean"], ["null"], ["boolean", "null"], ["integer", "null"]))
        return {"type": kind[0] if len(kind) == 1 else kind}

    def _integer(self, depth: int) -> Any:
        low = self._random.randrange(-1000, 1000)
        bounds = {"minimum": low, "maximum": low + self._random.randrange(5000)}
        if self._random.random() < 0.2:
            return {"type": "integer", "multipleOf": self._random.choice((2, 5, 10)), "minimum": 0, "maximum": 1000}
        return {"type": "integer", **(bounds if self._random.random() < 0.8 else {"exclusiveMinimum": low})}

    def _number(self, depth: int) -> Any:
        return {"type": "number", "minimum": -2.5, "maximum": self._random.choice((0.25, 3, 1000))}

    def _string(self, depth: int) -> Any:
        draw, low = self._random, self._random.randrange(3)
        return draw.choice((
            {"type": "string", "minLength": low, "maxLength": low + draw.randrange(6)},
            {"type": "string", "pattern": draw.choice((r"^[a-c]{1,4}$", r"^\d{3}-\d{2}$", "^(yes|no)$", r"^x\w{0,3}$"))},
            {"type": "string", "format": draw.choice(FORMATS)}, {"type": "string", "maxLength": 12}))

    def _enum(self, depth: int) -> Any:
        values = [1, -2.5, "one", "zwölf", True, None, [1, "x"], {"k": "v"}, "", 'a"b\n']
        return {"enum": self._random.sample(values, self._random.randrange(1, 5))}

    def _const(self, depth: int) -> Any:
        return {"const": self._random.choice((7, "fixed", False, None, {"deep": [1, 2]}, "日本"))}

    def _object(self, depth: int) -> Any:
        draw = self._random
        names = draw.sample(NAMES, draw.randrange(0, 4))
        made: dict[str, Any] = {"type": "object", "properties": {name: self.schema(depth) for name in names}}
        if names and draw.random() < 0.8:
            made["required"] = draw.sample(names, draw.randrange(1, len(names) + 1))
        choice = draw.random()
        if choice < 0.1:
            made["propertyNames"] = {"enum": [*names, "other"]}
        elif choice < 0.7:
            made["additionalProperties"] = False
        elif choice < 0.8:
            made["additionalProperties"] = {"type": "boolean"}
        elif choice < 0.9:
            made.pop("required", None)
            made.update(properties={}, patternProperties={"^k[0-9]$": {"type": "integer"}}, additionalProperties=False)
        return made

    def _array(self, depth: int) -> Any:
        draw, low = self._random, self._random.randrange(3)
        if draw.random() < 0.1:
            return {"type": "array", "items": {"enum": ["a", "b", 3, True]}, "uniqueItems": True, "minItems": low}
        if draw.random() < 0.3:
            items = [self.schema(depth) for _ in range(draw.randrange(1, 4))]
            return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}
        return {"type": "array", "items": self.schema(depth), "minItems": low, "maxItems": low + draw.randrange(3)}

    def _any_of(self, depth: int) -> Any:
        return {"anyOf": [self.schema(depth) for _ in range(self._random.randrange(1, 4))]}

    def _one_of(self, depth: int) -> Any:
        if self._random.random() < 0.5:
            return {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "integer"}, {"type": "null"}]}
        return {"oneOf": [{
            "type": "object", "properties": {"kind": {"const": kind}, "value": self.schema(depth)},
            "required": ["kind", "value"], "additionalProperties": False} for kind in ("cat", "dog")]}

    def _all_of(self, depth: int) -> Any:
        return {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 50}]}

    def _reference(self, depth: int) -> Any:
        # References are resolved from the root; a schema below it carries none of its own.
        return {"type": "object", "properties": {"next": {"anyOf": [{"type": "null"}, self.schema(depth)]}},
                "required": ["next"], "additionalProperties": False}


def recursive() -> dict[str, Any]:
    """A schema that refers to itself."""
    return {
        "$ref": "#/$defs/node", "$defs": {"node": {
            "type": "object", "additionalProperties": False, "required": ["value"], "properties": {
                "value": {"type": "integer", "minimum": 0, "maximum": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}}}}}
