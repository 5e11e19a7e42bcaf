"""Forced tool calls through the helpers of OpenAI's Python client, which parse them into pydantic models."""
from __future__ import annotations

import json

import openai
from openai import OpenAI
from openai.lib.streaming.chat import ChatCompletionStreamState
from pydantic import BaseModel, Field

MODEL = "smollm2"


class GetWeather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=20)


WEATHER = [{"role": "user", "content": "What is the weather in Paris?"}]
NAMED = {"type": "function", "function": {"name": "GetWeather"}}


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
