"""Structured outputs over HTTP: the official client with pydantic models, and the examples of the page."""
from __future__ import annotations

import json
import re
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from tests.serving import Server

MODEL = "smollm2"
PAGE = Path(__file__).parents[2] / "docs" / "structured-outputs.md"


class Color(Enum):
    RED = "red"
    GREEN = "green"


class Fruit(BaseModel):
    color: Color
    weight_g: int
    ripe: bool


class Basket(BaseModel):
    fruits: list[Fruit]


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_parse_gives_pydantic_objects(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=ask("Describe an apple."), response_format=Fruit, temperature=0, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Fruit) and answer.choices[0].finish_reason == "stop"


def test_parse_of_a_stream(client: OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=ask("Two fruits."), response_format=Basket, temperature=0,
                                        max_tokens=30) as stream:
        try:
            message = stream.get_final_completion().choices[0].message
            assert isinstance(message.parsed, Basket)
        except openai.LengthFinishReasonError as error:           # the list may be long: then it was cut
            assert error.completion.choices[0].finish_reason == "length"


def test_choices_of_a_completion(client: OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Is water wet? ", n=3, temperature=1.5, seed=1, max_tokens=8,
                                       extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert {choice.text for choice in answer.choices} <= {"yes", "no"}
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_streamed_and_plain_answers_are_the_same(client: OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": ask("A date."), "max_tokens": 40, "temperature": 0.7, "seed": 5,
                            "extra_body": {"guided_regex": r"\d{4}-\d{2}-\d{2}"}}
    plain = client.chat.completions.create(**body).choices[0].message.content
    chunks = client.chat.completions.create(**body, stream=True)
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", plain or "")
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == plain


@pytest.mark.parametrize(("fields", "param"), [
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nope"}}}},
     "response_format"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"), ({"guided_grammar": "start: foo"}, "guided_grammar"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice")])
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400(smollm: Server, fields: dict[str, Any], param: str, stream: bool) -> None:
    answer = httpx.post(smollm.url + "/v1/chat/completions", timeout=60, json={
        "model": MODEL, "messages": ask("x"), "stream": stream, **fields})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_the_examples_of_the_page_run(smollm: Server) -> None:
    """Every ```json block is a body of a chat request, every ```python block a program."""
    text = PAGE.read_text()
    blocks = re.findall(r"^```json\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) >= 5
    for block in blocks:
        body = {"model": MODEL, "messages": ask("hello"), "max_tokens": 40, "temperature": 0, **json.loads(block)}
        answer = httpx.post(smollm.url + "/v1/chat/completions", json=body, timeout=120)
        assert answer.status_code == 200, (block, answer.text)
    for program in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        code = compile(program.replace("http://127.0.0.1:8000", smollm.url), str(PAGE), "exec")
        exec(code, {})
