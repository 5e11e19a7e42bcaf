"""Clients that people use, unmodified: what they make of our answers is what their users would see."""
from __future__ import annotations

import json
from typing import Any

import pytest

from tests.clients.conftest import MODEL, Run
from tests.serving import Server

pytestmark = pytest.mark.clients
PARIS = "The capital of France is Paris."


def assert_weather(arguments: Any) -> None:
    """Arguments that fit the tool's schema; what city a small model thinks of is its own business."""
    arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(arguments) == {"city"} and isinstance(arguments["city"], str)


def test_langchain(server: Server, python_clients: Run) -> None:
    found = python_clients("with_langchain.py", server)
    assert found["text"] == found["streamed"] == PARIS and found["chunks"] > 3
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + found["usage"]["output_tokens"]
    assert found["stream_usage"]["output_tokens"] == found["usage"]["output_tokens"]
    [call] = found["calls"]
    assert call["name"] == "weather" and call["id"]
    assert_weather(call["args"])
    assert set(found["city"]) == {"name", "country"}


def test_litellm(server: Server, python_clients: Run) -> None:
    for provider, found in python_clients("with_litellm.py", server).items():
        assert found["text"] == found["streamed"] == found["async"] == PARIS, provider
        assert found["tokens"] == found["stream_tokens"] > 0
        assert found["error"] == "NotFoundError"
        assert [call["name"] for call in found["call"]] == ["weather"]
        assert_weather(found["call"][0]["arguments"])


def test_instructor(server: Server, python_clients: Run) -> None:
    found = python_clients("with_instructor.py", server)
    assert len(found) == 2
    for whole, partial in found.values():
        assert set(whole) == {"name", "age"} and whole == partial and 0 <= whole["age"] <= 150


def test_openai_of_node(server: Server, node_clients: Run) -> None:
    found = node_clients("with_openai.mjs", server)
    assert found["text"] == found["streamed"] == found["helped"] == PARIS
    assert found["usage"]["completion_tokens"] > 0 and found["id"] and found["completion"]
    for calls in (found["call"], found["streamedCall"]):
        [call] = calls
        assert call["type"] == "function" and call["function"]["name"] == "weather" and call["id"]
        assert_weather(call["function"]["arguments"])
    assert set(found["parsed"]) == {"name", "country"}
    assert found["error"] == ["BadRequestError", 400, "temperature", "invalid_value"]
    assert found["seen"] >= 3 and found["models"] == [MODEL]


def test_the_ai_sdk(server: Server, node_clients: Run) -> None:
    found = node_clients("with_ai.mjs", server)
    assert found["text"] == found["streamed"] == PARIS and found["finish"] == "stop"
    assert found["tokens"] == found["streamTokens"] > 0
    [[name, arguments]] = found["calls"]
    assert name == "weather" and found["streamCalls"][0] == "weather" and found["run"] >= 2
    assert_weather(arguments)
    assert set(found["object"]) == {"name", "country"}
