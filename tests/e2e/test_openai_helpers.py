"""The helpers of OpenAI's Python client: parsed answers, streams with events, tools. They check what we send more closely
than people do. The model is small: what it says is its own business, the form is ours.
"""
from __future__ import annotations

from enum import Enum

import openai
import pytest
from openai import AsyncOpenAI, OpenAI
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


ASK = [{"role": "user", "content": "Describe a thing as JSON."}]


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


async def test_the_asynchronous_client(smollm: Server) -> None:
    async with AsyncOpenAI(base_url=smollm.url + "/v1", api_key="none", max_retries=0, timeout=120) as client:
        text = ""
        async for chunk in await client.chat.completions.create(
                model=MODEL, messages=QUESTION, temperature=0, max_tokens=30, stream=True):
            text += chunk.choices[0].delta.content or ""
        assert text == PARIS
