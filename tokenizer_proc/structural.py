"""Structural tags: free text, tags with constrained contents, and combinations of both, as one grammar.

Run by the tokenizer. Reads both forms that clients send: `structures` with `triggers`, and the newer tree of formats
(docs/structured-outputs.md lists them). A format that is not known is refused by name.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.grammars import dump
from tokenizer_proc.ebnf import to_lark
from tokenizer_proc.json_schemas import Unusable, prepare
from tokenizer_proc.lark import ANYTHING, Writer, pattern, quoted

MAX_REPEAT = 10_000
Form = Mapping[str, Any]


def to_grammar(tag: Any, tokens: Mapping[str, int], whitespace: str | None) -> str:
    """The library's grammar for a structural tag (the whole object); `tokens`: text -> id of the model's tokens."""
    if not isinstance(tag, dict):
        raise Unusable("A structural tag must be an object.")
    if "structures" in tag or "triggers" in tag:
        return StructuralTag(tokens, whitespace).grammar(_legacy(tag))
    if not isinstance(tag.get("format"), dict):
        raise Unusable("A structural tag needs 'format', or 'structures' and 'triggers'.")
    return StructuralTag(tokens, whitespace).grammar(tag["format"])


def _legacy(tag: Form) -> Form:
    structures = _list(tag, "structures")
    return {"type": "triggered_tags", "triggers": tag.get("triggers"), "tags": [
        {"begin": _text(item, "begin"), "end": _text(item, "end"),
         "content": {"type": "json_schema", "json_schema": item.get("schema", {})}} for item in structures]}


class StructuralTag:
    """Turns formats into expressions of one grammar."""

    def __init__(self, tokens: Mapping[str, int], whitespace: str | None) -> None:
        self._writer, self._whitespace = Writer(tokens), whitespace
        self._forms: Mapping[str, Callable[[Form], str]] = {
            "const_string": lambda form: self._writer.text(_text(form, "value")) or '""',
            "json_schema": self._json, "regex": lambda form: pattern(_text(form, "pattern")),
            "grammar": lambda form: self._writer.other(as_lark(_text(form, "grammar"))),
            "any_text": self._any_text, "sequence": self._sequence, "or": self._or, "tag": self._tag,
            "triggered_tags": self._triggered, "tags_with_separator": self._separated,
            "qwen_xml_parameter": lambda form: self._json({**form, "style": "qwen_xml"}),
            "optional": lambda form: self._repeated(form, "?"), "star": lambda form: self._repeated(form, "*"),
            "plus": lambda form: self._repeated(form, "+"), "repeat": self._repeat}

    def grammar(self, form: Form) -> str:
        return self._writer.grammar(self._expression(form))

    def _expression(self, form: Any) -> str:
        kind = form.get("type") if isinstance(form, dict) else None
        if not isinstance(kind, str):
            raise Unusable("Each format of a structural tag must be an object with a 'type'.")
        if kind not in self._forms:
            raise Unusable(f"Structural tags have no format '{kind[:40]}'.")
        return self._forms[kind](form)

    # ---- contents ------------------------------------------------------------------------------------------------

    def _json(self, form: Form) -> str:
        style, schema = form.get("style", "json"), form.get("json_schema", {})
        if style == "json":
            return f"%json {dump(prepare(schema, self._whitespace))}"
        if style not in _XML:
            raise Unusable(f"Structural tags have no style '{str(style)[:40]}'.")
        return self._parameters(prepare(schema, self._whitespace), *_XML[style])

    def _parameters(self, schema: Form, before: str, between: str, after: str) -> str:
        """Arguments as tags: before NAME between VALUE after, in the order of the schema."""
        properties = schema.get("properties", {})
        if not isinstance(properties, dict):
            raise Unusable("The properties of a JSON schema must be an object.")
        required = schema.get("required")
        parts = []
        for name, value in properties.items():
            part = f"{self._writer.text(before + name + between)} {self._value(schema, value, after)}"
            rule = self._writer.rule(part)
            parts.append(rule if isinstance(required, list) and name in required else f"{rule}?")
        return f"({' '.join(parts)})" if parts else '""'

    def _value(self, root: Form, schema: Any, after: str) -> str:
        """One value and what ends it: text as it is, anything else as JSON."""
        if isinstance(schema, dict) and schema.get("type") == "string":
            texts = schema.get("enum")
            if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
                return f"({' | '.join(quoted(text) for text in texts)}) {self._writer.text(after)}"
            if not schema.keys() & {"const", "enum", "pattern", "format", "minLength", "maxLength"}:
                return self._writer.until(after)
        shared = {key: root[key] for key in ("$defs", "definitions", "x-guidance") if key in root}
        inner = {**schema, **shared} if isinstance(schema, dict) else {"anyOf": [schema], **shared}
        return f"%json {dump(inner)} {self._writer.text(after)}"

    def _any_text(self, form: Form) -> str:
        if form.get("excludes"):
            raise Unusable("'excludes' of 'any_text' is not supported.")
        return self._writer.rule(ANYTHING)

    # ---- combinations --------------------------------------------------------------------------------------------

    def _sequence(self, form: Form) -> str:
        elements = _list(form, "elements")
        parts, i = [], 0
        while i < len(elements):
            element = elements[i]
            following = elements[i + 1] if i + 1 < len(elements) else None
            if isinstance(element, dict) and element.get("type") == "any_text" and following is not None:
                parts.append(self._text_then(element, following))
                i += 1
            else:
                parts.append(self._expression(element))
            i += 1
        return f"({' '.join(parts)})"

    def _text_then(self, element: Form, following: Any) -> str:
        """Any text and then something that begins with a known text, which is what ends the first."""
        self._any_text(element)
        kind = following.get("type") if isinstance(following, dict) else None
        if kind == "const_string" and _text(following, "value"):
            return self._writer.until(_text(following, "value"))
        if kind == "tag" and _text(following, "begin"):
            return f"{self._writer.until(_text(following, 'begin'))} {self._inside(following)}"
        raise Unusable("In a structural tag 'any_text' must be the last element, or followed by a string or a tag.")

    def _or(self, form: Form) -> str:
        return f"({' | '.join(self._expression(element) for element in _list(form, 'elements'))})"

    def _tag(self, form: Form, skip: int = 0) -> str:
        """A tag, less the first `skip` characters of its beginning."""
        return f"({self._writer.text(_text(form, 'begin')[skip:])} {self._inside(form)})"

    def _inside(self, tag: Form) -> str:
        """The content of a tag and its end."""
        content, ends = tag.get("content"), tag.get("end")
        ends = ends if isinstance(ends, list) and ends else [_text(tag, "end")]
        if not all(isinstance(end, str) for end in ends):
            raise Unusable("'end' of a tag must be a string.")
        if isinstance(content, dict) and content.get("type") == "any_text":
            self._any_text(content)
            return f"({' | '.join(self._writer.until(end) if end else ANYTHING for end in ends)})"
        closing = " | ".join(self._writer.text(end) or '""' for end in ends)
        return f"{self._expression(content)} ({closing})"

    def _triggered(self, form: Form) -> str:
        """Free text in which a trigger opens one of the tags that begin with it."""
        triggers, tags = _list(form, "triggers"), _list(form, "tags")
        if form.get("excludes"):
            raise Unusable("'excludes' of 'triggered_tags' is not supported.")
        groups: dict[str, list[str]] = {}
        for tag in tags:
            begin = _text(tag, "begin")
            found = [t for t in triggers if isinstance(t, str) and t and begin.startswith(t)]
            if not found:
                raise Unusable("Every tag of a structural tag must begin with one of its triggers.")
            trigger = max(found, key=len)
            groups.setdefault(trigger, []).append(self._tag(tag, len(trigger)))
        opened = [f"{self._writer.until(trigger)} ({' | '.join(group)})" for trigger, group in groups.items()]
        one = self._writer.rule(" | ".join(opened))
        if form.get("stop_after_first"):
            return one if form.get("at_least_one") else f"({one} | {self._writer.rule(ANYTHING)})"
        return f"({one}{'+' if form.get('at_least_one') else '*'} {self._writer.rule(ANYTHING)})"

    def _separated(self, form: Form) -> str:
        tags = self._writer.rule(" | ".join(self._tag(tag) for tag in _list(form, "tags")))
        body = tags
        if not form.get("stop_after_first"):
            body = f"{tags} ({self._writer.text(_text(form, 'separator', ''))} {tags})*"
        return f"({body})" if form.get("at_least_one") else f"({body})?"

    def _repeated(self, form: Form, mark: str) -> str:
        return f"({self._expression(form.get('content'))}){mark}"

    def _repeat(self, form: Form) -> str:
        low, high = form.get("min", 0), form.get("max", -1)
        if type(low) is not int or type(high) is not int or not 0 <= low <= MAX_REPEAT or not (
                high == -1 or low <= high <= MAX_REPEAT):
            raise Unusable(f"'min' and 'max' of a repetition must be between 0 and {MAX_REPEAT}, or 'max' -1.")
        return f"({self._expression(form.get('content'))}){{{low},{'' if high == -1 else high}}}"


# style -> what stands before a parameter's name, between name and value, and after the value
_XML: Mapping[str, tuple[str, str, str]] = {
    "qwen_xml": ("<parameter=", ">\n", "\n</parameter>\n"),
    "glm_xml": ("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n")}


def as_lark(text: str) -> str:
    """A grammar as users write them, as Lark."""
    return to_lark(text) if "::=" in text else text


def _text(form: Any, name: str, otherwise: str | None = None) -> str:
    value = form.get(name, otherwise) if isinstance(form, dict) else None
    if not isinstance(value, str):
        raise Unusable(f"'{name}' of a structural tag must be a string.")
    return value


def _list(form: Form, name: str) -> list[Any]:
    value = form.get(name)
    if not isinstance(value, list) or not value:
        raise Unusable(f"'{name}' of a structural tag must be a list that is not empty.")
    return value

