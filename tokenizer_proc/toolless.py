"""Tools for models whose chat template knows none: told in the system message, called as a JSON list.

Run by the tokenizer. The list is what the parser "json" of pipeline.families reads, and what a grammar makes the model
write where a call is required. Calls and results in the conversation become text that any template shows.
"""
from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]


def knows_tools(source: str) -> bool:
    """Whether a template shows tools by itself."""
    return "tools" in source


def told(messages: list[Message], tools: list[Any], source: str, wants_parts: bool) -> list[Message]:
    """`messages` for the template `source`, with what it does not show of tools, calls and results as text."""
    if "message['tools']" in source and tools:           # as Phi-4-mini: the tools are a key of the system message
        return _with_system(messages, "", wants_parts, tools=json.dumps(tools, ensure_ascii=False))
    if knows_tools(source):
        return messages
    if "tool_calls" not in source:
        messages = [_as_text(message, wants_parts) for message in messages]
    return _with_system(messages, _instructions(tools), wants_parts) if tools else messages


def _instructions(tools: list[Any]) -> str:
    lines = [json.dumps(tool.get("function", tool) if isinstance(tool, dict) else tool, ensure_ascii=False) for tool in tools]
    return "\n".join([
        "You can call functions. These are their names, descriptions and parameters, one function a line:", *lines,
        "To call functions, answer with a JSON list and nothing else:",
        '[{"name": "function name", "parameters": {"parameter": "value"}}]',
        "Their results come with the next message. Where no function helps, answer in words."])


def _with_system(messages: list[Message], text: str, wants_parts: bool, **keys: Any) -> list[Message]:
    """With `text` behind the text of the system message, which is made where there is none."""
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": [] if wants_parts else ""}, *messages]
    first = {**messages[0], **keys}
    content = first["content"]
    if not text:
        pass
    elif isinstance(content, list):
        first["content"] = [*content, {"type": "text", "text": ("\n\n" if content else "") + text}]
    else:
        first["content"] = f"{content}\n\n{text}" if content else text
    return [first, *messages[1:]]


def _as_text(message: Message, wants_parts: bool) -> Message:
    """Calls as the list that the model wrote, results as a message of the user."""
    calls = message.get("tool_calls")
    if message["role"] == "tool":
        about = f" {message['name']}" if isinstance(message.get("name"), str) else ""
        return {"role": "user", "content": _joined(f"Result of the function{about}:", message["content"], wants_parts)}
    if not calls:
        return message
    made = [{"name": call["function"]["name"], "parameters": call["function"]["arguments"]} for call in calls]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**rest, "content": _joined(json.dumps(made, ensure_ascii=False), message["content"], wants_parts, first=False)}


def _joined(text: str, content: Any, wants_parts: bool, first: bool = True) -> Any:
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    joined = "\n".join(filter(None, (text, content) if first else (content, text)))
    return [{"type": "text", "text": joined}] if wants_parts else joined
