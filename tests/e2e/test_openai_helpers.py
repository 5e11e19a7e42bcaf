"""The helpers of OpenAI's Python client: parsed answers, streams with events, tools. They check what we send more closely
than people do. The model is small: what it says is its own business, the form is ours.
"""
from __future__ import annotations

import json
from enum import Enum

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel, Field

from tests.serving import Server

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
PARIS = "The capital of France is Paris."


class Colour(Enum):
    RED = "red"
    GREEN = "green"


class Thing(BaseModel):
    name: str = Field(max_length=20)
    colour: Colour
    count: int = Field(ge=0, le=9)


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=20)


ASK = [{"role": "user", "content": "Describe a thing as JSON."}]
WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED = {"type": "function", "function": {"name": "GetWeather"}}


def test_a_parsed_answer_is_a_model(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=ASK, response_format=Thing, temperature=0, max_tokens=120)
    thing = answer.choices[0].message.parsed
    assert isinstance(thing, Thing) and thing.colour in Colour and 0 <= thing.count <= 9
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].message.refusal is None


def test_an_answer_that_is_cut_is_said_to_be(client: OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model=MODEL, messages=ASK, response_format=Thing, temperature=0, max_tokens=3)


def test_a_stream_of_a_parsed_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(
            model=MODEL, messages=ASK, response_format=Thing, temperature=0, max_tokens=120) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds.count("content.done") == 1 and kinds.count("content.delta") > 3
    assert isinstance(final.choices[0].message.parsed, Thing)


def test_the_streaming_helper_gives_the_plain_answer(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=30, n=2,
                                        logprobs=True,
                                        stream_options={"include_usage": True}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    assert [choice.message.content for choice in final.choices] == [PARIS, PARIS]
    assert final.usage is not None and final.usage.completion_tokens == sum(
        len(choice.logprobs.content) for choice in final.choices)


def test_a_parsed_tool_call(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=WEATHER, tools=[openai.pydantic_function_tool(GetWeather)], tool_choice=NAMED,
        temperature=0, max_tokens=60)
    [call] = answer.choices[0].message.tool_calls or []
    assert call.function.name == "GetWeather" and isinstance(call.function.parsed_arguments, GetWeather)
    assert call.id and call.type == "function" and answer.choices[0].finish_reason == "tool_calls"


def test_a_streamed_tool_call_is_put_together_by_the_client(client: OpenAI) -> None:
    tools = [openai.pydantic_function_tool(GetWeather)]
    state = ChatCompletionStreamState(input_tools=tools)
    for chunk in client.chat.completions.create(
            model=MODEL, messages=WEATHER, tools=tools, tool_choice="required", temperature=0, max_tokens=60,
            parallel_tool_calls=False, stream=True):
        state.handle_chunk(chunk)
    final = state.get_final_completion()
    calls = final.choices[0].message.tool_calls or []
    assert calls and final.choices[0].finish_reason in ("tool_calls", "length")
    assert set(json.loads(calls[0].function.arguments)) == {"city"}


def test_a_tools_result_goes_back(client: OpenAI) -> None:
    tools = [openai.pydantic_function_tool(GetWeather)]
    first = client.chat.completions.create(
        model=MODEL, messages=WEATHER, tools=tools, tool_choice=NAMED, temperature=0, max_tokens=60).choices[0].message
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "18 degrees"}
    second = client.chat.completions.create(
        model=MODEL, messages=[*WEATHER, first, result], tools=tools, tool_choice="none", temperature=0, max_tokens=20)
    assert second.choices[0].message.content and not second.choices[0].message.tool_calls


async def test_the_asynchronous_client(smollm: Server) -> None:
    async with AsyncOpenAI(base_url=smollm.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        text = ""
        async for chunk in await client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=0, max_tokens=30, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == PARIS
