"""/docs: the API's description as one plain page, written from /openapi.json; no script and nothing from elsewhere.

Run by the frontend, once.
"""
from __future__ import annotations

from html import escape
from typing import Any

from frontend.fields import NO_EFFECT, REFUSED

_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code{font-size:.95em}"
          "table{border-collapse:collapse;width:100%}td{border-top:1px solid #ccc;padding:.2em .6em;vertical-align:top}"
          "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}td{border-color:#333}a{color:#8bf}}")
_LIMITS = {"minimum": "at least {}", "exclusiveMinimum": "above {}", "maximum": "at most {}",
           "exclusiveMaximum": "below {}", "maxItems": "up to {} items", "maxProperties": "up to {} entries",
           "maxLength": "up to {} characters"}
FAR = 2**31                      # limits beyond this are those of the number's type: not worth a word
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def page(document: dict[str, Any]) -> bytes:
    """The page for an OpenAPI document of frontend.openapi."""
    schemas = document["components"]["schemas"]
    parts = [f"<h1>{escape(document['info']['title'])} {escape(document['info']['version'])}</h1>",
             "<p>The machine-readable form is <a href='openapi.json'>/openapi.json</a>.</p>"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(operation['summary'])}</p>")
            content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
            for schema in content.get("schema", {}).get("anyOf", [content["schema"]] if content else []):
                parts.append(_table(schemas[schema["$ref"].rsplit("/", 1)[1]]))
    parts.append(f"<h2>Fields without effect</h2><p>{_codes(NO_EFFECT)}</p>")
    parts.append("<h2>Fields that are refused</h2><p>Known, and accepted only with a value that asks for nothing: "
                 f"{_codes(sorted(REFUSED))}</p>")
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>API</title><style>{_STYLE}</style>{''.join(parts)}</html>").encode()


def _table(schema: dict[str, Any]) -> str:
    required = schema.get("required", [])
    rows = "".join(f"<tr><td><code>{escape(name)}</code>{' (required)' if name in required else ''}</td>"
                   f"<td>{escape(kind(field))}</td></tr>" for name, field in sorted(schema["properties"].items()))
    return f"<p>{escape(schema.get('description', ''))}</p><table>{rows}</table>"


def kind(field: dict[str, Any]) -> str:
    """A JSON schema's type and limits in words."""
    if "anyOf" in field:
        return " or ".join(kind(f) for f in field["anyOf"] if f.get("type") != "null")
    if "enum" in field:
        return ", ".join(map(str, field["enum"]))
    word = field.get("type") or field.get("$ref", "object").rsplit("/", 1)[-1]
    limits = ", ".join(text.format(field[key]) for key, text in _LIMITS.items()
                       if key in field and abs(field[key]) < FAR)
    return f"{word}{' of ' + kind(field['items']) if 'items' in field else ''}{' (' + limits + ')' if limits else ''}"


def _codes(names: Any) -> str:
    return ", ".join(f"<code>{escape(name)}</code>" for name in names)
