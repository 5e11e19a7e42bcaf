"""Chat messages as clients send them -> as chat templates expect them. Everything that is wrong is named by its path.

Run by the tokenizer. Pure functions over JSON values.
"""
from __future__ import annotations

import json
from typing import Any

from pipeline.errors import QuartetError

TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
RESERVED = frozenset((
    "messages", "conversation", "conversations", "tools", "documents", "tokenize", "chat_template", "padding",
    "truncation", "max_length", "add_generation_prompt", "continue_final_message", "self", "tokenizer_kwargs",
    "processor_kwargs"))
MAX_DEPTH = 64


def wrong(message: str, param: str = "messages") -> QuartetError:
    return QuartetError("invalid_value", message, param)


def parse(data: bytes, kind: type, param: str) -> Any:
    """The JSON value in `data`, of type `kind`; an empty one for no data."""
    if not data:
        return kind()
    try:
        value = json.loads(data)
        if not isinstance(value, kind):
            raise TypeError
        check_depth(value, param)
        return value
    except (ValueError, TypeError, RecursionError):
        raise wrong(f"'{param}' must be a JSON {'object' if kind is dict else 'array'}.", param) from None


def check_depth(value: Any, param: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level if isinstance(item, (dict, list))
                 for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise wrong(f"'{param}' is nested too deeply.", param)


def template_kwargs(data: bytes) -> dict[str, Any]:
    """chat_template_kwargs: variables for the template, none of which may stand in for the server's own."""
    kwargs = parse(data, dict, "chat_template_kwargs")
    for name in kwargs:
        if is_reserved(name):
            raise wrong(f"'chat_template_kwargs' must not set '{name[:100]}'.", "chat_template_kwargs")
    return dict(kwargs)


def is_reserved(name: str) -> bool:
    """Whether a template's variable of this name is the server's own."""
    return name in RESERVED or name.startswith("return_")


def normalise(data: bytes, *, wants_parts: bool, knows_developer: bool,
              wants_argument_text: bool = False) -> list[dict[str, Any]]:
    """Messages with contents in the form that the template wants, and tool arguments as objects, or as JSON text."""
    messages = parse(data, list, "messages")
    if not messages:
        raise wrong("'messages' is empty.")
    result = [_message(message, f"messages[{n}]", wants_parts, knows_developer) for n, message in enumerate(messages)]
    if wants_argument_text:
        for call in (call for message in result for call in message.get("tool_calls") or ()):
            call["function"]["arguments"] = _as_text(call["function"]["arguments"])
    if not knows_developer and any(message["role"] == "developer" for message in messages):
        result = _one_system_message(result, wants_parts)
    return result


def _one_system_message(messages: list[dict[str, Any]], wants_parts: bool) -> list[dict[str, Any]]:
    """All system messages as one at the front: a template that knows no developers often allows no second one."""
    contents = [message["content"] for message in messages if message["role"] == "system"]
    joined = [part for content in contents for part in content] if wants_parts else "\n\n".join(contents)
    return [{"role": "system", "content": joined}, *(m for m in messages if m["role"] != "system")]


def text_chars(messages: list[dict[str, Any]]) -> int:
    """Characters in the contents of normalised messages."""
    return sum(len(m["content"]) if isinstance(m["content"], str) else sum(len(part["text"]) for part in m["content"])
               for m in messages)


def _message(message: Any, where: str, wants_parts: bool, knows_developer: bool) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong(f"{where} must be an object.")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise wrong(f"{where}.role must be a string.")
    result = dict(message)
    if role == "developer" and not knows_developer:
        result["role"] = "system"
    calls = message.get("tool_calls")
    if calls is None:
        result.pop("tool_calls", None)
    else:
        result["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    reasoning = message.get("reasoning_content", message.get("reasoning"))
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise wrong(f"{where}.reasoning_content must be a string.")
        result["reasoning"] = result["reasoning_content"] = reasoning
    content = message.get("content")
    if content is None:
        if role != "assistant" or not (calls or message.get("function_call") or reasoning):
            raise wrong(f"{where}.content must be a string or an array of parts.")
        result["content"] = ""
    else:
        result["content"] = _content(content, f"{where}.content", wants_parts and role != "tool")
    return result


def _content(content: Any, where: str, wants_parts: bool) -> str | list[dict[str, str]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if wants_parts else content
    if not isinstance(content, list):
        raise wrong(f"{where} must be a string or an array of parts.")
    texts = [_part(part, f"{where}[{n}]") for n, part in enumerate(content)]
    return [{"type": "text", "text": text} for text in texts] if wants_parts else "\n".join(texts)


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise wrong(f"{where}.type must be a string.")
    if kind not in TEXT_PARTS:
        raise QuartetError("unsupported_parameter", f"Content parts of type '{kind[:50]}' ({where}) are not supported "
                           "by this model.", "messages")
    text = part.get(TEXT_PARTS[kind])
    if not isinstance(text, str):
        raise wrong(f"{where}.{TEXT_PARTS[kind]} must be a string.")
    return text


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Calls whose arguments are objects where they are the JSON text of one, as templates expect."""
    if not isinstance(calls, list):
        raise wrong(f"{where} must be an array.")
    result = []
    for n, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise wrong(f"{where}[{n}].function must be an object with a name.")
        result.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return result


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _arguments(arguments: Any) -> Any:
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, str):
        try:
            value = json.loads(arguments)
            check_depth(value, "messages")
        except (ValueError, RecursionError):
            return arguments
        return value if isinstance(value, dict) else arguments
    return arguments
