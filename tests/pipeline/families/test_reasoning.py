"""Reasoning: where it begins and ends, for each family and each way a prompt can end."""
from __future__ import annotations

import pytest

from pipeline.families.reasoning import REASONINGS, Start
from pipeline.families.table import HARMONY_REASONING, AnswerParser
from tests.pipeline.families.samples import Answer, answer

OPEN, SHUT = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def parse(reasoning: str, pieces: list[str], tail: str = "") -> Answer:
    parser = AnswerParser("", reasoning, {}, 0, tail)
    for piece in pieces:
        parser.push(piece)
    parser.end()
    return answer(*parser.parts.take())


@pytest.mark.parametrize(("reasoning", "tail", "text", "content", "thought"), [
    ("qwen3", "", "<think>\nA b.\n</think>\n\nC", "C", "A b."),
    ("qwen3", "", "No thought. </think> is a tag.", "No thought. </think> is a tag.", ""),
    ("qwen3", OPEN, "A\n</think>\n\nC", "C", "A"),
    ("qwen3", OPEN, "<think>A</think>C", "C", "A"), ("qwen3", OPEN, "</think>\n\nC", "C", ""),
    ("qwen3", OPEN, "\n</think>C", "C", ""), ("qwen3", OPEN, "<</think>C", "C", "<"), ("deepseek_r1", "", "</think>C", "C", ""),
    ("qwen3", SHUT, "C <think>D</think>", "C <think>D</think>", ""),
    ("qwen3", "", "<think>never ends", "", "never ends"),
    ("qwen3", "", "<think>\n\n</think>\n\nC", "C", ""),
    ("qwen3", "", "<thinking>", "<thinking>", ""), ("qwen3", "", "<thi", "<thi", ""), ("qwen3", "", " \n", " \n", ""),
    ("think", "", "<think>A</think>B</think>C", "B</think>C", "A"),
    ("deepseek_r1", "", "A</think>C", "C", "A"),
    ("deepseek_r1", "", "<think>\nA</think>\nC", "C", "A"),
    ("deepseek_r1", "", "no end", "", "no end"),
    ("deepseek_r1", "<｜Assistant｜></think>", "C", "C", ""),
    ("granite", "", "Here is my thought process: A\n\nHere is my response: C", "C", "A"),
    ("granite", "", "Here's my thought process:A Here's my response:\nC", "C", "A"),
    ("granite", "", "Here is my thought", "Here is my thought", ""),
    ("mistral", "", "[THINK]A[/THINK]C", "C", "A"), ("seed_oss", "", "<seed:think>A</seed:think>C", "C", "A"),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>final<|message|>C", "C", "A"),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>cut", "", "cut"),
    ("openai_gptoss", "", "<|channel|>final<|message|>C<|return|>", "C", ""),
    ("openai_gptoss", "", "<|channel|>analysis<|message|>A<|end|><|start|>assis", "", "A"),
])
def test_reasoning_is_taken_out(reasoning: str, tail: str, text: str, content: str, thought: str) -> None:
    assert parse(reasoning, [text], tail) == parse(reasoning, list(text), tail) == Answer(content, thought)


def test_every_family_has_a_case_and_tags_that_are_no_beginning_of_each_other() -> None:
    for reasoning in REASONINGS.values():
        assert (reasoning.name == HARMONY_REASONING) == (not reasoning.openers)
        for tags in (reasoning.openers, reasoning.closers):
            assert not any(a != b and b.startswith(a) for a in tags for b in tags)


def test_the_end_of_the_prompt_tells_whether_an_answer_begins_with_reasoning() -> None:
    qwen3, r1 = REASONINGS["qwen3"], REASONINGS["deepseek_r1"]
    assert [qwen3.start(tail) for tail in (OPEN, SHUT, "assistant\n")] == [Start.INSIDE, Start.OUTSIDE, Start.UNKNOWN]
    assert [qwen3.begins_inside(tail) for tail in (OPEN, SHUT, "")] == [True, False, False]
    assert [r1.begins_inside(tail) for tail in (OPEN, SHUT, "")] == [True, False, True]


def test_thinking_tells_what_the_next_character_is() -> None:
    parser, seen = AnswerParser("", "qwen3", {}, 0, ""), []
    for piece in ("<think>", "A", "</think>", "B"):
        parser.push(piece)
        seen.append(parser.thinking)
    assert seen == [True, True, False, False]
