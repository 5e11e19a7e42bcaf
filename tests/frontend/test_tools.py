"""Tools in a chat request: what is refused, what the template and the parser get, and the answer over HTTP.

The answers come from a real detokenizer (tests.frontend.served), family by family, streamed and not.
"""
from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from frontend.tools import CallIds
from pipeline.config import ModelConfig
from pipeline.errors import QuartetError
from pipeline.families.table import FAMILIES
from tests.frontend.served import served
from tests.frontend.test_params import chat, refused, with_model
from tests.frontend.world import config
from tests.pipeline.families.samples import CITY, SAMPLES, Sample

WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "The weather", "parameters": {
    "type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}, "required": ["city"]}}}
NOW = {"type": "function", "function": {"name": "now"}}
SAVE = {"type": "function", "function": {"name": "save", "parameters": {"type": "object", "properties": {
    "text": {"type": "string"}, "tags": {"type": "array"}, "options": {"type": "object"}, "ratio": {"type": "number"},
    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}}}
TOOLS = [WEATHER, NOW, SAVE]


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def parameters(**schema: Any) -> dict[str, Any]:
    return tool(parameters={"type": "object", **schema})


# ---- requests ----

@pytest.mark.parametrize(("tools", "param"), [
    ("x", "tools"), ([1], "tools[0]"), ([{}], "tools[0].function"), ([{**NOW, "type": "web_search"}], "tools[0].type"),
    ([{"type": "function"}], "tools[0].function"), ([tool(name="")], "tools[0].function.name"),
    ([tool(name="a b")], "tools[0].function.name"), ([tool(name="x" * 129)], "tools[0].function.name"),
    ([tool(name=5)], "tools[0].function.name"), ([NOW, NOW], "tools[1].function.name"),
    ([tool(parameters="x")], "tools[0].function.parameters"), ([tool(strict="yes")], "tools[0].function.strict"),
    ([tool(parameters={"type": "string"})], "tools[0].function.parameters"),
    *(([parameters(**schema)], "tools[0].function.parameters") for schema in (
        {"properties": []}, {"properties": {"a": 5}}, {"properties": {"a": {"type": "text"}}}, {"required": "a"},
        {"required": [1]}, {"properties": {"a": {"enum": []}}}, {"properties": {"a": {"anyOf": []}}},
        {"properties": {"a": {"items": 3}}}, {"properties": {"a": {"minLength": -1}}},
        {"properties": {"a": {"maximum": "9"}}}, {"properties": {"a": {"pattern": 1}}}, {"$defs": {"x": None}},
        {"properties": {"a": {"$ref": 1}}}, {"properties": {"a": {"type": []}}})),
    ([tool(name=f"f{n}") for n in range(1025)], "tools"),
])
def test_tools_that_cannot_be_used_are_refused(tools: Any, param: str) -> None:
    assert refused(chat, tools=tools).param == param


@pytest.mark.parametrize("choice", [
    "required", {"type": "function", "function": {"name": "other"}}, "any", 5, {"type": "function"},
    {"type": "custom", "custom": {"name": "now"}},
    {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": []}}])
def test_choices_that_cannot_be_made_are_refused(choice: Any) -> None:
    error = refused(chat, tool_choice=choice, tools=[NOW] if choice != "required" else [])
    assert (error.param or "").startswith("tool_choice")


def seen(ask: Any) -> list[str]:
    """The tools that the template sees."""
    data = ask.spec.prompts[0].chat.tools_json
    return [entry["function"]["name"] for entry in json.loads(data)] if data else []


def test_the_choice_decides_what_the_template_sees_and_whether_calls_are_looked_for() -> None:
    server = with_model(tool_parser="hermes")
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [
        {"type": "function", "function": {"name": "save"}}]}}
    for choice, names, parser in ((None, ["get_weather", "now", "save"], "hermes"), ("none", [], ""),
                                  ("auto", ["get_weather", "now", "save"], "hermes"), (allowed, ["save"], "hermes")):
        ask = chat(server, tools=TOOLS, tool_choice=choice)
        assert (seen(ask), ask.spec.detok.tool_parser) == (names, parser)
        assert list(json.loads(ask.spec.detok.signatures or b"{}")) == (names if parser else [])
    assert chat(server, tools=[]).spec.detok.tool_parser == chat(server).spec.detok.tool_parser == ""
    assert chat(with_model(tool_parser=""), tools=TOOLS).spec.detok.tool_parser == ""


def test_calls_that_must_come_are_a_grammar_in_the_format_of_the_family() -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for family, expected in (("hermes", "<tool_call>"), ("", '"parameters": '), ("pythonic", '"parameters": ')):
        server = with_model(tool_parser=family)
        required, one = (chat(server, tools=TOOLS, tool_choice=choice) for choice in ("required", named))
        for ask in (required, one):
            grammar = ask.spec.sampling.grammar
            assert grammar is not None and grammar.kind == "structural_tag" and grammar.param == "tools"
            assert expected in str(json.loads(grammar.text))
            assert ask.spec.detok.tool_parser == ("hermes" if family == "hermes" else "json")
        assert seen(required) == ["get_weather", "now", "save"] and seen(one) == ["now"]
        assert "get_weather" not in one.spec.sampling.grammar.text
        assert [ask.spec.detok.max_calls for ask in (required, one)] == [0, 1]
        assert chat(server, tools=TOOLS).spec.sampling.grammar is None
    assert refused(chat, tools=TOOLS, tool_choice="required", use_beam_search=True, n=2).param == "tool_choice"


def test_strict_tools_and_answers_in_a_format_are_grammars_under_auto() -> None:
    strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
    server = with_model(tool_parser="hermes")
    text = chat(server, tools=[strict, NOW]).spec.sampling.grammar.text
    assert "triggered_tags" in text and '"days"' in text
    both = chat(server, tools=TOOLS, response_format={"type": "json_object"}).spec.sampling.grammar
    assert both.kind == "structural_tag" and '"or"' in both.text
    plain = chat(server, tools=TOOLS, tool_choice="none", response_format={"type": "json_object"}).spec.sampling.grammar
    assert plain.kind == "json_object"
    with pytest.raises(QuartetError) as error:
        chat(with_model(tool_parser="pythonic"), tools=[strict])
    assert error.value.param == "tools"


def test_templates_see_every_key_and_nothing_that_is_meant_for_the_server() -> None:
    ask = chat(with_model(tool_parser="hermes"), tools=[{**tool(strict=True), "defer_loading": True}])
    assert json.loads(ask.spec.prompts[0].chat.tools_json) == [{"type": "function", "function": {
        "name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}}]


def test_parallel_tool_calls_false_takes_one() -> None:
    server = with_model(tool_parser="hermes")
    assert chat(server, tools=TOOLS).spec.detok.max_calls == 0
    assert chat(server, tools=TOOLS, parallel_tool_calls=False).spec.detok.max_calls == 1


def test_parsers_that_need_types_are_told_them() -> None:
    schema = {"type": "object", "$defs": {"Level": {"enum": ["low", 3]}}, "properties": {
        "a": {"type": "string"}, "b": {"type": ["integer", "null"]}, "c": {"$ref": "#/$defs/Level"}, "d": {},
        "e": {"anyOf": [{"type": "string"}, {"type": "number"}]}, "f": {"const": True}, "g": {"$ref": "#/$defs/none"},
        "h": True}}
    ask = chat(with_model(tool_parser="glm45"), tools=[tool(parameters=schema)])
    assert json.loads(ask.spec.detok.signatures) == {"f": {
        "a": "string", "b": "integer|null", "c": "integer|string", "d": "", "e": "number|string", "f": "boolean",
        "g": "", "h": ""}}
    assert json.loads(chat(with_model(tool_parser="hermes"), tools=[tool()]).spec.detok.signatures) == {"f": {}}


def test_ids_are_the_same_whoever_asks_and_in_the_form_of_the_family() -> None:
    for form, pattern in (("call", "call_"), ("mistral", ""), ("kimi", "functions.f:7")):
        ids = CallIds(form, before=7)
        assert ids.of(0, 0, "f") == ids.of(0, 0, "f") != ids.of(0, 1, "f") and ids.of(0, 0, "f").startswith(pattern)
    assert len(CallIds("mistral").of(0, 0, "f")) == 9 and CallIds("mistral").of(0, 0, "f").isalnum()
    assert CallIds("call").of(0, 0, "f") != CallIds("call").of(0, 0, "f") and len(CallIds("call").of(1, 2, "f")) == 29


# ---- answers ----

def models() -> tuple[ModelConfig, ...]:
    """A model for each family, and reasoning of its own where a sample has it."""
    base = config().models[0]
    pairs = {(sample.family, sample.reasoning_family) for sample in SAMPLES} | {("", "qwen3"), ("hermes", "qwen3")}
    return tuple(ModelConfig(names=(f"{tools}-{reasoning}",), path=base.path, tool_parser=tools, max_model_len=1000,
                             reasoning_parser=reasoning, vocab_size=base.vocab_size, engine=base.engine)
                 for tools, reasoning in sorted(pairs))


def ask(text: str, family: str, reasoning: str = "", **more: Any) -> dict[str, Any]:
    return {"model": f"{family}-{reasoning}", "messages": [{"role": "user", "content": text}],
            "tools": TOOLS, **more}


def joined(lines: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]], str | None]:
    """(the message that the deltas of one choice make, the deltas, the finish reason); checks their form."""
    message: dict[str, Any] = {"role": None, "content": None, "tool_calls": []}
    deltas, finish = [], None
    assert lines[-1] == "data: [DONE]"
    for line in lines[:-1]:
        [choice] = json.loads(line[6:])["choices"]
        delta = choice["delta"]
        deltas.append(delta)
        assert "content" in delta and finish is None
        finish = choice["finish_reason"]
        message["role"] = message["role"] or delta.get("role")
        for key in ("content", "reasoning", "reasoning_content"):
            if delta.get(key):
                message[key] = (message.get(key) or "") + delta[key]
        assert "tool_calls" not in delta or delta["tool_calls"]
        for piece in delta.get("tool_calls", ()):
            calls = message["tool_calls"]
            if piece["index"] == len(calls):
                assert set(piece) == {"index", "id", "type", "function"} and piece["function"]["arguments"] == ""
                calls.append({"id": piece["id"], "type": "function", "function": dict(piece["function"])})
            else:
                assert set(piece) == {"index", "function"} and set(piece["function"]) == {"arguments"}
                assert piece["index"] == len(calls) - 1
                calls[-1]["function"]["arguments"] += piece["function"]["arguments"]
    return message, deltas, finish


async def both(http: httpx.AsyncClient, body: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The one choice of a plain answer, and the same answer streamed: they say the same."""
    plain = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
    streamed = await http.post("/v1/chat/completions", json={**body, "stream": True})
    message, _, finish = joined([line for line in streamed.text.split("\n") if line])
    told = plain["message"]
    assert finish == plain["finish_reason"] and message["role"] == told["role"]
    assert (message["content"] or "") == (told["content"] or "")
    assert [message.get(key) for key in ("reasoning", "reasoning_content")] == [
        told.get(key) for key in ("reasoning", "reasoning_content")]
    assert [call["function"] for call in message["tool_calls"]] == [
        call["function"] for call in told.get("tool_calls", [])]
    return plain, message


async def test_every_family_answers_in_openais_form_streamed_or_not() -> None:
    async with served(models=models()) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        for sample in SAMPLES:
            plain, _ = await both(http, ask(sample.text, sample.family, sample.reasoning_family))
            _check(plain, sample)


def _check(choice: dict[str, Any], sample: Sample) -> None:
    message = choice["message"]
    calls = message.get("tool_calls", [])
    assert [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls] == list(sample.calls)
    assert choice["finish_reason"] == ("tool_calls" if sample.calls else "stop") and choice["stop_reason"] is None
    assert message["content"] == (sample.content or (None if sample.calls else ""))
    assert message.get("reasoning", "") == message.get("reasoning_content", "") == sample.reasoning
    assert ("tool_calls" in message) == bool(sample.calls) and len({call["id"] for call in calls}) == len(calls)


CALL = f'<think>\nHm.\n</think>\n\n<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(CITY)}}}\n</tool_call>'


async def test_reasoning_is_shown_hidden_and_counted() -> None:
    async with served(models=models()) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        body = ask("<think>\nHm, well.\n</think>\n\nYes.", "hermes", "qwen3")
        shown = (await http.post("/v1/chat/completions", json=body)).json()
        assert shown["choices"][0]["message"]["reasoning"] == "Hm, well."
        count = shown["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert 0 < count < shown["usage"]["completion_tokens"]
        more = {"include_reasoning": False, "logprobs": True, "return_token_ids": True}
        hidden = (await http.post("/v1/chat/completions", json={**body, **more})).json()
        choice = hidden["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}
        assert hidden["usage"] == shown["usage"]
        assert len(choice["token_ids"]) == len(choice["logprobs"]["content"]) == (
            hidden["usage"]["completion_tokens"] - count)
        streamed = await http.post("/v1/chat/completions", json={**body, **more, "stream": True, "stream_options": {
            "include_usage": True, "continuous_usage_stats": True}})
        chunks = [json.loads(line[6:]) for line in streamed.text.split("\n") if line and "[DONE]" not in line]
        assert "reasoning" not in streamed.text.replace("reasoning_tokens", "")
        ids = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids", [])]
        assert ids == choice["token_ids"] and chunks[-1]["usage"] == shown["usage"]
        plain = (await http.post("/v1/chat/completions", json={**body, "tools": None, "model": "-qwen3"})).json()
        assert plain["choices"][0]["message"]["reasoning_content"] == "Hm, well."


async def test_an_answer_without_calls_is_an_answer() -> None:
    async with served(models=models()) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        plain, _ = await both(http, ask("Just <b>text</b>.", "hermes"))
        assert plain["message"] == {"role": "assistant", "content": "Just <b>text</b>.", "refusal": None}
        assert plain["finish_reason"] == "stop"
        off, _ = await both(http, ask(CALL, "hermes", tool_choice="none"))
        assert off["message"]["content"] == "Hello there!"     # parsed by nobody: the paper pipeline's own words


async def test_what_is_cut_off_within_a_call_ends_by_length() -> None:
    async with served(models=models()) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        cut, _ = await both(http, ask(CALL, "hermes", "qwen3", max_tokens=60))
        assert cut["finish_reason"] == "length" and cut["message"]["tool_calls"][0]["function"]["name"] == "get_weather"


async def test_one_call_at_a_time_and_choices_of_their_own() -> None:
    two = next(sample for sample in SAMPLES if sample.family == "hermes" and len(sample.calls) == 2)
    async with served(models=models()) as server, httpx.AsyncClient(base_url=server.url, timeout=30) as http:
        one, _ = await both(http, ask(two.text, "hermes", parallel_tool_calls=False))
        assert len(one["message"]["tool_calls"]) == 1 and one["finish_reason"] == "tool_calls"
        assert one["stop_reason"] is None
        answer = (await http.post("/v1/chat/completions", json=ask(two.text, "hermes", n=3))).json()
        ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
        assert len(ids) == len(set(ids)) == 6 and all(i.startswith("call_") for i in ids)


def test_every_family_is_served_here() -> None:
    assert {model.tool_parser for model in models()} - {""} == set(FAMILIES)
