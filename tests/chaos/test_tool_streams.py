"""Tool calls and reasoning through the whole server, and through the death of each of its processes.

The null engine says what the last message says, so that a conversation is a script of the model's part.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from openai import OpenAI

from pipeline.client import Client
from tests.chaos.streams import TIMEOUT
from tests.chaos.test_deaths import STAGES, kill
from tests.frontend.test_tools import CALL, TOOLS, joined
from tests.pipeline.families.samples import CITY, SAMPLES
from tests.serving import Server, gguf
from tests.waiting import until

# The comment is what a template of this family would have; it chooses the parsers.
TEMPLATE = "{# tools tool_calls <tool_call> </tool_call> enable_thinking </think> #}{{ messages[-1].content }}"
TWO = next(sample for sample in SAMPLES if sample.family == "hermes" and len(sample.calls) == 2).text
TEXTS = {"thought and call": CALL, "two calls": TWO, "no call": "<think>\nShort.\n</think>\n\n" + "Plain words. " * 20}


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"ipc://{tmp_path_factory.mktemp('door')}/clients"


@pytest.fixture(scope="module")
def saying(door: str) -> Iterator[Server]:
    with Server("--null-engine", "say", "--null-step", "0.01", "--served-model-name", "null", "--crash-limit", "1000",
                "--chat-template", TEMPLATE, "--zmq-endpoint", door, model=str(gguf())) as server:
        yield server
        server.assert_idle(10)


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "null", "messages": [{"role": "user", "content": text}], "tools": TOOLS, "max_tokens": 400, **more}


async def stream(url: str, request: dict[str, Any], disturb: Callable[[], Any] | None = None,
                 after: int = 0) -> tuple[dict[str, Any], str | None, dict[str, Any]]:
    """(message, finish reason, usage); `disturb` is called once, after so many lines."""
    lines, usage = [], {}
    request = {**request, "stream": True, "stream_options": {"include_usage": True}}
    async with httpx.AsyncClient(timeout=TIMEOUT) as client, \
            client.stream("POST", url + "/v1/chat/completions", json=request) as answer:
        async for line in answer.aiter_lines():
            if not line.startswith("data: "):
                continue
            usage = json.loads(line[6:]).get("usage") or usage if line != "data: [DONE]" else usage
            if '"choices":[]' not in line:
                lines.append(line)
            if disturb is not None and len(lines) == after:
                act, disturb = disturb, None
                act()
    assert disturb is None, "the answer was too short to be disturbed"
    message, _, finish = joined(lines)
    for call in message["tool_calls"]:
        assert call.pop("id").startswith("call_")
    usage.pop("prompt_tokens_details")                   # a continuation finds its prompt in the cache
    return message, finish, usage


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("text", "moments"), [
    ("thought and call", (30,)), *(pytest.param(text, (3, 12, 45), marks=pytest.mark.slow) for text in TEXTS)])
def test_an_answer_survives_the_death_of_a_stage(saying: Server, stage: str, text: str, moments: tuple[int, ...]) -> None:
    request = body(TEXTS[text])
    clean = asyncio.run(stream(saying.url, request))
    assert clean[1] == ("stop" if text == "no call" else "tool_calls")
    for after in moments:
        hurt = asyncio.run(stream(saying.url, request, lambda: kill(saying, stage), after))
        assert hurt == clean
        until(lambda: saying.get("/ready")[0] == 200, 60, "ready again")


def test_the_official_client_sees_calls_reasoning_and_counts(saying: Server) -> None:
    with OpenAI(base_url=saying.url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
        answer = client.chat.completions.create(**body(CALL))
        [choice] = answer.choices
        [call] = choice.message.tool_calls or []
        assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", CITY)
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        assert choice.message.model_extra["reasoning"] == "Hm."
        assert answer.usage.completion_tokens_details.reasoning_tokens > 0
        with client.chat.completions.stream(**body(TWO)) as events:
            names = [event.name for event in events if event.type == "tool_calls.function.arguments.done"]
            final = events.get_final_completion().choices[0]
        assert names == ["get_weather", "now"] and final.finish_reason == "tool_calls"
        assert json.loads(final.message.tool_calls[0].function.arguments) == CITY
        said = [{"role": "assistant", "content": None, "tool_calls": [call.model_dump() for call in final.message.tool_calls]},
                {"role": "tool", "tool_call_id": final.message.tool_calls[0].id, "content": "Rain."}]
        again = client.chat.completions.create(**body("x") | {"messages": [{"role": "user", "content": "?"}, *said]})
        assert again.choices[0].message.content == "Rain." and again.choices[0].finish_reason == "stop"


def test_the_in_cluster_client_sees_the_same_deltas(saying: Server, door: str) -> None:
    request = body(CALL)
    message, finish, _ = asyncio.run(stream(saying.url, request))
    with Client(door + ".0") as client:
        deltas = list(client.stream_chat(**request))
    parts = [part for delta in deltas for part in delta.parts]
    assert "".join(part.get("reasoning") or "" for part in parts) == message["reasoning"]
    pieces = [piece["function"] for part in parts for piece in part.get("tool_calls", ())]
    assert pieces[0]["name"] == "get_weather" and [d.finish_reason for d in deltas][-1] == finish == "tool_calls"
    assert "".join(piece["arguments"] for piece in pieces) == message["tool_calls"][0]["function"]["arguments"]
    assert "".join(delta.text for delta in deltas) == ""


def test_one_call_ends_the_work_as_well(saying: Server) -> None:
    """With parallel_tool_calls false nothing is computed behind the first call."""
    whole = httpx.post(saying.url + "/v1/chat/completions", json=body(TWO), timeout=60).json()
    one = httpx.post(saying.url + "/v1/chat/completions", json=body(TWO, parallel_tool_calls=False), timeout=60).json()
    assert len(one["choices"][0]["message"]["tool_calls"]) == 1
    assert one["choices"][0]["finish_reason"] == "tool_calls"
    assert one["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
