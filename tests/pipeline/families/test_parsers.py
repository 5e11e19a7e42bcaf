"""Every family's own samples, however they are cut; what is malformed; and text that no model should write."""
from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.families.table import FAMILIES, AnswerParser, marker_tokens
from tests.pipeline.families.samples import CITY_JSON, SAMPLES, SIGNATURES, Answer, Sample, parse

NAMES = [*FAMILIES]
samples = pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: f"{s.family}-{s.text[:20]!r}")


def states(family: str, reasoning: str, pieces: list[str]) -> list[Answer]:
    """The answer so far after each piece."""
    parser = AnswerParser(family, reasoning, SIGNATURES, 0, "")
    seen = []
    for piece in pieces:
        parser.push(piece)
        seen.append(_told(parser))
    return seen


def _told(parser: AnswerParser) -> Answer:
    from tests.pipeline.families.samples import answer
    return answer("".join(parser.parts.texts), parser.parts.spans)


def test_every_family_has_a_sample() -> None:
    assert {sample.family for sample in SAMPLES} == set(FAMILIES)


@samples
def test_a_sample_means_what_it_says(sample: Sample) -> None:
    found = parse(sample.family, [sample.text], sample.reasoning_family)
    assert tuple((name, json.loads(arguments)) for name, arguments in found.calls) == sample.calls
    assert (found.content, found.reasoning) == (sample.content, sample.reasoning)


@samples
def test_no_cut_changes_an_answer(sample: Sample) -> None:
    text, family, reasoning = sample.text, sample.family, sample.reasoning_family
    whole = parse(family, [text], reasoning)
    assert parse(family, list(text), reasoning) == whole
    for i in range(1, len(text)):
        assert parse(family, [text[:i], text[i:]], reasoning) == whole
    size = len(text)
    for i in range(1, size) if size < 90 else ():
        for j in range(i + 1, size):
            assert parse(family, [text[:i], text[i:j], text[j:]], reasoning) == whole


@samples
def test_what_was_told_depends_on_the_text_alone(sample: Sample) -> None:
    """A detokenizer that replays a prefix in one piece stands where its predecessor stood."""
    text, family, reasoning = sample.text, sample.family, sample.reasoning_family
    single = states(family, reasoning, list(text))
    for i in range(1, len(text)):
        assert states(family, reasoning, [text[:i]])[0] == single[i - 1], text[:i]


@samples
def test_a_sample_cut_off_anywhere_loses_no_text(sample: Sample) -> None:
    """Every prefix ends, and a call in it has a known name and the arguments that were written so far."""
    for i in range(len(sample.text)):
        found = parse(sample.family, [sample.text[:i]], sample.reasoning_family)
        for (name, arguments), (expected, _) in zip(found.calls, sample.calls):
            assert name == expected and (not arguments or arguments.startswith("{"))


def test_arguments_stream_as_they_come() -> None:
    told = states("hermes", "", list(f'<tool_call>{{"name": "get_weather", "arguments": {CITY_JSON}}}</tool_call>'))
    lengths = [len(answer.calls[0][1]) for answer in told if answer.calls]
    assert len(set(lengths)) > 20 and lengths == sorted(lengths)
    coder = "<tool_call><function=save><parameter=text>\nabcdefghijklmnopqrstuvwxyz"
    assert states("qwen3_coder", "", list(coder))[-1].calls == (("save", '{"text": "abcdefghijklmnopqrstuvwxyz'),)


@pytest.mark.parametrize(("family", "text", "content"), [
    ("hermes", "<tool_call>nonsense</tool_call> x", None),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "a b", "arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>', None),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None),
    ("hermes", '<tool_call>{"name": 5}</tool_call>', None),
    ("hermes", "a <tool_call", None), ("hermes", "a < b", None), ("hermes", " \n ", None),
    ("hermes", '{"name": "unknown", "arguments": {}}', None),
    ("hermes", '{"name": "now", "arguments": {}} that was it', None),
    ("hermes", '{"name": "now", "arguments": {}, "more": 1}', None),
    ("hermes", '{"temperature": 20}', None), ("hermes", "{", None),
    ("llama3_json", '{"name": "Bob", "parameters": {}}', None), ("llama3_json", '{"a": 1}', None),
    ("pythonic", "[1, 2, 3]", None), ("pythonic", "[unknown(a=1)]", None), ("pythonic", "[get_weather]", None),
    ("pythonic", "[__import__('os').system('true')]", None),
    ("mistral", "[TOOL_CALLS]", None), ("mistral", "[TOOL_CALLS]no call", None),
    ("qwen3_coder", "<tool_call>\nnow()\n</tool_call>", None), ("glm45", "<tool_call>a b<c></tool_call>", None),
    ("deepseek_v3", "<｜tool▁call▁begin｜>other<｜tool▁sep｜>x", None),
    ("phi4_mini_json", "functools is a module", None), ("granite", "<|tool_call|> []", None),
    ("openai", "plain words", None), ("json", "[1]", None), ("json", '[{"name": "unknown"}]', None),
])
def test_what_is_no_call_is_content(family: str, text: str, content: str | None) -> None:
    assert parse(family, [text]) == Answer(text if content is None else content)


@pytest.mark.parametrize(("family", "text", "arguments"), [
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>', '{"a": oops}}'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1', '{"a": 1'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "line\nbreak"}}</tool_call>', '{"a": "line\\nbreak"}'),
    ("mistral", '[TOOL_CALLS]now{"a": \'x\'}', '{"a": \'x\'}'),
    ("qwen3_coder", "<tool_call><function=now>\nwhat\n</function></tool_call>", "{}"),
    ("qwen3_coder", "<tool_call><function=save><parameter=text>\nhalf", '{"text": "half'),
    ("qwen3_coder", "<tool_call><function=get_weather><parameter=days>many</parameter></function></tool_call>",
     '{"days": "many"}'),
    ("pythonic", "[now(a=1, b=!)]", '{"a": 1}'),
    ("pythonic", r"[now(a='\ud83c\udf0d', b='\ud83c!')]", '{"a": "🌍", "b": "\ufffd!"}'),
    ("hermes", r'<tool_call>{"name": "now", "arguments": "{\"a\": \"\ud83c!\"}"}</tool_call>', '{"a": "\ufffd!"}'),
])
def test_a_call_that_goes_wrong_after_its_name_keeps_what_was_written(family: str, text: str, arguments: str) -> None:
    assert parse(family, [text]).calls[0][1] == arguments


def test_only_so_many_calls_are_taken() -> None:
    two = SAMPLES[0].text
    assert len(parse("hermes", [two]).calls) == 2
    for pieces in ([two], list(two)):
        parser = AnswerParser("hermes", "", SIGNATURES, 1, "")
        for piece in pieces:
            parser.push(piece)
        assert parser.done
        parser.end()
        assert _told(parser) == Answer("On it.", "", (("get_weather", CITY_JSON),))


TOKENS = sorted({token for name in FAMILIES for token in marker_tokens(name, "")} | {
    "<tool_call>", "</tool_call>", "<function=", "<parameter=", "</parameter>", "</function>", "<arg_key>", "</arg_key>",
    "<arg_value>", "</arg_value>", "functools[", "[TOOL_CALLS]", "<think>", "</think>", "functions.now:0", "to=functions.now",
    '{"name": "now", ', '"arguments": ', '"parameters": {', '"function": ', "{}", "[", "]", "{", "}", "(", ")", ",", ":",
    ";", '"', "'", "\\", "\\u12", "\\ud83c", "\\x4", "```json", "```", "now", "now(", "get_weather", "a=1", "1e5", "-", "0",
    "true", "None", " ", "\n", "\ud7ff", "é", "🌍", "\0", "x" * 40, "Here is my thought process:",
    "Here is my response:"})


@settings(max_examples=150)
@given(family=st.sampled_from(NAMES), reasoning=st.sampled_from(["", "qwen3", "deepseek_r1", "granite"]),
       words=st.lists(st.one_of(st.sampled_from(TOKENS), st.text(max_size=4)), max_size=30), data=st.data())
def test_whatever_is_written_ends_and_no_cut_matters(family: str, reasoning: str, words: list[str],
                                                      data: st.DataObject) -> None:
    text = "".join(words)
    whole = parse(family, [text], reasoning)
    assert parse(family, list(text), reasoning) == whole
    at = data.draw(st.integers(0, len(text)))
    assert parse(family, [text[:at], text[at:]], reasoning) == whole
    if at:
        assert states(family, reasoning, [text[:at]])[0] == states(family, reasoning, list(text[:at]))[-1]


@pytest.mark.parametrize("family", NAMES)
def test_long_and_deep_text_costs_little(family: str) -> None:
    """Bounded recursion, linear time: a parser that copied what it holds for every token would not get through this."""
    for text in ("[" * 50_000, '{"a":' * 20_000, '{"name": "now", "arguments": ' + "[" * 9000, "<" * 50_000,
                 " " * 50_000, '{"name": "now", "arguments": {"a": "' + "x" * 100_000):
        pieces = [text[i:i + 4] for i in range(0, len(text), 4)]
        parse(family, pieces)
