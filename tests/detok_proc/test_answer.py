"""A choice whose answer is parsed: markers that are special tokens, reasoning tokens, ends, and replays."""
from __future__ import annotations

import json
from functools import cache

import pytest
from tokenizers import AddedToken, Tokenizer

from detok_proc.choice import Choice
from detok_proc.vocab import Vocab
from pipeline.families.parts import append_span
from pipeline.messages import Finish, Open, TokenOut, Usage, pack_ids
from pipeline.params import DetokSpec
from tests.detok_proc import zoo
from tests.pipeline.families.samples import SAMPLES, SIGNATURES, Answer, Sample, answer, parse

MARKERS = ["[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|tool_call|>", "<|channel|>", "<|message|>", "<|start|>", "<|end|>",
           "<|call|>", "<|constrain|>", "<|python_tag|>", "<think>", "</think>"]
KINDS = ("byte_level", "byte_fallback", "suffixed")


@cache
def vocab(kind: str) -> Vocab:
    """A tokenizer of this kind with the families' markers as special tokens."""
    tokenizer = Tokenizer.from_str(zoo.ZOO[kind]().to_str())
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in MARKERS])
    return Vocab(tokenizer, zoo.special_ids(tokenizer))


def ids_of(text: str, kind: str = "byte_level") -> list[int]:
    return list(vocab(kind).tokenizer.encode(text, add_special_tokens=False).ids)


class Listener:
    """A choice, and what its deltas add up to."""

    def __init__(self, spec: DetokSpec, kind: str = "byte_level", left: str = "", history: list[int] | None = None) -> None:
        spec.signatures = json.dumps(SIGNATURES).encode()
        self.choice = Choice(Open(64, spec, pack_ids(ids_of(left, kind)), pack_ids(history or [])), vocab(kind), 0, 1)
        self.text, self.spans, self.start = "", list[tuple[int, int]](), self.choice.have
        self.chars, self.reasoning_tokens, self.open_call = self.choice.sent_chars, 0, False

    def push(self, ids: list[int], finish: Finish = Finish.RUNNING) -> int | None:
        hit = self.choice.apply(TokenOut(64, self.choice.have, pack_ids(ids), finish, None, None, None, Usage(1, 0, 1)))
        self.choice.assert_invariants()
        self.take()
        return hit

    def take(self) -> None:
        delta = self.choice.delta()
        assert delta.offset == self.chars and sum(span.chars for span in delta.spans) == len(delta.text)
        self.text += delta.text
        self.chars += len(delta.text)
        for span in delta.spans:
            append_span(self.spans, span.kind, span.chars)
        self.reasoning_tokens, self.open_call = delta.reasoning_tokens, delta.open_call
        self.choice.sent()

    @property
    def answer(self) -> Answer:
        return answer(self.text, self.spans)


def test_special_tokens_are_markers_and_not_text() -> None:
    for kind in KINDS:
        heard = Listener(DetokSpec(tool_parser="mistral"), kind)
        for number in ids_of('Hello world.<|im_end|>[TOOL_CALLS]now{"a": 1}', kind):
            heard.push([number])
        heard.push([], Finish.LENGTH)
        found = heard.answer
        if kind == "suffixed":               # its decoder does not give back the spaces of a text
            assert len(found.calls) == 1
        else:
            assert [(name, json.loads(text)) for name, text in found.calls] == [("now", {"a": 1})], kind
        assert "<|" not in found.content and "[" not in found.content


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.family in ("hermes", "openai", "mistral", "qwen3_coder")],
                         ids=lambda s: f"{s.family}-{s.text[:16]!r}")
def test_a_new_detokenizer_goes_on_where_the_old_one_stood(sample: Sample) -> None:
    """Whatever the frontend had heard, replay and rest give the answer that one process would have given."""
    spec = {"tool_parser": sample.family, "reasoning_parser": sample.reasoning_family}
    ids = ids_of(sample.text)
    whole = parse(sample.family, [sample.text], sample.reasoning_family)
    for cut in range(0, len(ids) + 1, 3):
        first = Listener(DetokSpec(**spec))
        for number in ids[:cut]:
            first.push([number])
        second = Listener(DetokSpec(**spec), history=ids[:cut])
        assert second.chars == first.chars
        second.push(ids[cut:], Finish.LENGTH)
        for kind, chars in second.spans:
            append_span(first.spans, kind, chars)
        assert answer(first.text + second.text, first.spans) == whole


def test_reasoning_tokens_are_counted_and_replayed() -> None:
    ids = ids_of("<think>\nA b c.</think>Well.")
    end = ids.index(ids_of("</think>")[0]) + 1
    heard = Listener(DetokSpec(reasoning_parser="qwen3"))
    for number in ids:
        heard.push([number])
    again = Listener(DetokSpec(reasoning_parser="qwen3"), history=ids[:4])
    again.push(ids[4:], Finish.LENGTH)
    assert heard.reasoning_tokens == again.reasoning_tokens == end
    assert heard.answer == Answer("Well.", "A b c.")


def test_the_end_of_the_prompt_opens_the_reasoning() -> None:
    for left, expected in (("<|im_start|>assistant\n<think>\n", Answer("B", "A")),
                           ("<think>\n\n</think>\n\n", Answer("A</think>B"))):
        heard = Listener(DetokSpec(reasoning_parser="qwen3"), left=left)
        heard.push(ids_of("A</think>B"), Finish.LENGTH)
        assert heard.answer == expected


def test_one_call_is_enough_where_no_more_are_wanted() -> None:
    ids = ids_of('<tool_call>{"name": "now", "arguments": {}}</tool_call><tool_call>{"name": "now"}</tool_call>')
    heard = Listener(DetokSpec(tool_parser="hermes", max_calls=1))
    hit = heard.push(ids)
    assert hit is not None and hit < len(ids) and heard.choice.stopped and heard.choice.finish == Finish.STOP_STRING
    assert heard.choice.delta().stop is None and heard.answer == Answer(calls=(("now", "{}"),))
    again = Listener(DetokSpec(tool_parser="hermes", max_calls=1), history=ids[:hit])
    again.take()
    assert again.choice.stopped and again.choice.finish == Finish.STOP_STRING and again.text == ""


def test_stop_strings_are_looked_for_in_what_the_model_wrote() -> None:
    heard = Listener(DetokSpec(tool_parser="hermes", stop=['"days"']))
    heard.push(ids_of('Hm.<tool_call>{"name": "get_weather", "arguments": {"days": 3}}</tool_call>'))
    assert heard.answer == Answer("Hm.", "", (("get_weather", "{"),)) and heard.open_call
    ahead = Listener(DetokSpec(tool_parser="hermes", stop=["</tool_call>"]))
    ahead.push(ids_of('<tool_call>{"name": "now", "arguments": {}}</tool_call>'))
    assert ahead.answer == Answer(calls=(("now", "{}"),)) and not ahead.open_call


def test_text_that_was_held_back_for_a_marker_comes_with_the_end() -> None:
    for finish in (Finish.LENGTH, Finish.EOS):
        heard = Listener(DetokSpec(tool_parser="hermes"))
        heard.push(ids_of("a <too"))
        assert heard.answer == Answer("a")
        heard.push([zoo.token(vocab("byte_level").tokenizer, "</s>")], finish)
        assert heard.answer.content.startswith("a <too")


def test_an_answer_that_breaks_off_within_a_call_says_so() -> None:
    for text, unfinished in (('<tool_call>{"name": "now", "arguments": {"a": ', True),
                             ('<tool_call>{"name": "now", "arguments": {}', False), ("no call", False)):
        heard = Listener(DetokSpec(tool_parser="hermes"))
        heard.push(ids_of(text), Finish.LENGTH)
        assert heard.open_call == unfinished, text
