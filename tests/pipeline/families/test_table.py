"""Which family a chat template speaks, and what holds for every description."""
from __future__ import annotations

import pytest

from pipeline.families.calls import MarkedParser
from pipeline.families.table import FAMILIES, GENERIC, family_of, marker_tokens, reasoning_of, tool_parser

# The lines of well-known templates that tell their family.
LINES = [
    ("hermes", "qwen3", "return a json object within <tool_call></tool_call> XML tags:\n<tool_call>\n"
     "{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>' }}"),
    ("hermes", "", "{{ '<tool_call>\\n{\"name\": \"' + call.name + '\", \"arguments\": ' }}</tool_call>"),
    ("qwen3_coder", "", "<tool_call>\n<function=example_function_name>\n<parameter=example_parameter_1>"),
    ("glm45", "qwen3", "<tool_call>{function-name}\n<arg_key>{arg-key-1}</arg_key>\n<arg_value>{arg-value-1}</arg_value>"
     "{% if enable_thinking %}</think>"),
    ("llama3_json", "", '{{- "<|python_tag|>" + tool_call.name }}{"name": function name, "parameters": dictionary}'),
    ("llama3_json", "", '{%- if tools %}{{- \'{"name": "\' + call.name + \'", \' }}{{- \'"parameters": \' }}'),
    ("mistral", "", '{{- "[TOOL_CALLS] [" }}'), ("mistral", "mistral", "[TOOL_CALLS] [THINK] [/THINK]"),
    ("deepseek_v3", "", "<｜tool▁calls▁begin｜>function<｜tool▁sep｜>\\n```json"),
    ("deepseek_v3", "deepseek_r1", "<｜tool▁sep｜>```json {{'<｜Assistant｜><think>\\n'}}</think>"),
    ("deepseek_v31", "think", "<｜tool▁call▁begin｜><｜tool▁sep｜>{{ '</think>' }}"),
    ("kimi_k2", "", "<|tool_calls_section_begin|>"), ("granite", "granite", "<|tool_call|> Here is my thought process:"),
    ("phi4_mini_json", "", "'<|tool|>' + message['tools'] + '<|/tool|>'"),
    ("pythonic", "", "[func_name1(params_name1=params_value1)]"), ("pythonic", "", "<|python_start|>"),
    ("openai", "openai_gptoss", "<|start|>assistant<|channel|>analysis<|message|>"),
    (GENERIC, "", "{{ message.role }}: {{ message.content }}"), (GENERIC, "", ""),
]


@pytest.mark.parametrize(("family", "reasoning", "template"), LINES)
def test_a_template_tells_its_families(family: str, reasoning: str, template: str) -> None:
    assert (family_of(template), reasoning_of(template)) == (family, reasoning)


def test_every_family_is_found_by_a_template() -> None:
    assert {family for family, _, _ in LINES} == set(FAMILIES)


MARKED = {name: family.parser for name, family in FAMILIES.items() if issubclass(family.parser, MarkedParser)}


@pytest.mark.parametrize("name", MARKED)
def test_no_marker_is_the_beginning_of_another(name: str) -> None:
    parser = MARKED[name]
    for markers in (parser.markers, parser.closers):
        assert not any(a != b and b.startswith(a) for a in markers for b in markers)


def test_names_of_other_servers_are_known_and_others_are_refused() -> None:
    assert tool_parser("qwen3_xml") == "qwen3_coder" and tool_parser("auto") == "auto"
    with pytest.raises(ValueError, match="one of openai"):
        tool_parser("nonesuch")


def test_marker_tokens_are_those_of_both_parsers() -> None:
    assert marker_tokens("mistral", "mistral") == {"[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "[THINK]", "[/THINK]"}
    assert not marker_tokens("", "") and "<|channel|>" in marker_tokens("", "openai_gptoss")
