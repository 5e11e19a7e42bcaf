"""Tools for templates that know none: told in the system message; calls and results as text."""
from __future__ import annotations

import json
from pathlib import Path

from tests.tokenizer_proc.test_chat import CHATML, PARTS, USER, chat, model, text

TOOL = {"type": "function", "function": {"name": "now", "description": "The time", "parameters": {"type": "object"}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [
    {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{\"zone\": \"UTC\"}"}}]}
RESULT = {"role": "tool", "tool_call_id": "1", "content": "noon"}


def test_tools_are_told_in_the_system_message(tmp_path: Path) -> None:
    m = model(tmp_path)
    made = text(m, chat(USER, tools=[TOOL]))
    assert made.startswith("<|im_start|>system\nYou can call functions.") and json.dumps(TOOL["function"]) in made
    assert made.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    kept = text(m, chat({"role": "system", "content": "Be kind."}, USER, tools=[TOOL]))
    assert kept.startswith("<|im_start|>system\nBe kind.\n\nYou can call functions.") and kept.count("system") == 1
    assert "functions" not in text(m, chat(USER))


def test_calls_and_results_are_text(tmp_path: Path) -> None:
    made = text(model(tmp_path), chat(USER, CALLED, RESULT, tools=[TOOL]))
    assert '<|im_start|>assistant\n[{"name": "now", "parameters": {"zone": "UTC"}}]<|im_end|>' in made
    assert "<|im_start|>user\nResult of the function:\nnoon<|im_end|>" in made


def test_templates_that_want_parts_get_parts(tmp_path: Path) -> None:
    made = text(model(tmp_path, PARTS), chat(USER, CALLED, RESULT, tools=[TOOL]))
    assert made.startswith("<s>[system]You can call functions.") and "[user]Result of the function:\nnoon|" in made


def test_a_template_that_knows_tools_is_left_alone(tmp_path: Path) -> None:
    m = model(tmp_path, "{{ tools | tojson }}{% for m in messages %}{{ m.role }}{{ m.tool_calls }}{% endfor %}")
    assert "You can call" not in text(m, chat(USER, CALLED, RESULT, tools=[TOOL]))


def test_a_template_that_takes_tools_from_the_system_message_finds_them_there(tmp_path: Path) -> None:
    m = model(tmp_path, CHATML.replace("message.content", "message.content + (message['tools'] or '')"))
    assert '<|im_start|>system\n[{"type": "function"' in text(m, chat(USER, tools=[TOOL]))
