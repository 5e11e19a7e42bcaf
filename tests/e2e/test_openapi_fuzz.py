"""Our own /openapi.json, played back by schemathesis: whatever it lets people send, and much that it does not.

No 5xx, no hang, every error OpenAI-shaped, every stream ends as documented. The null engine answers; a short context keeps
the longest answer short. The full count is behind -m slow.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.core.transport import Response

from frontend.openapi import document
from pipeline.errors import CATALOGUE
from tests.frontend.world import config
from tests.serving import Server, gguf

SCHEMA = schemathesis.openapi.from_dict(document(config()))
OPERATIONS = {operation.label: operation for operation in (found.ok() for found in SCHEMA.get_all_operations())}
POSTS = [label for label in OPERATIONS if label.startswith("POST")]
MODES = [GenerationMode.POSITIVE, GenerationMode.NEGATIVE]
HANG_S = 20.0


@pytest.fixture(scope="module")
def short() -> Iterator[Server]:
    with Server("--null-engine", "hash", "--max-model-len", "64", "--served-model-name", "null",
                "--enable-tokenizer-info-endpoint",
                model=str(gguf())) as server:
        yield server
        server.assert_idle()


def check(response: Response) -> None:
    """The status, and the form that goes with it."""
    assert response.status_code < 500, response.text[:500]
    assert response.headers["x-request-id"]
    media = response.headers.get("content-type", [""])[0]
    if response.status_code >= 400:
        error = response.json()
        assert set(error) == {"error"} and set(error["error"]) == {"message", "type", "param", "code"}
        assert CATALOGUE[error["error"]["code"]][:2] == (response.status_code, error["error"]["type"])
    elif media.startswith("text/event-stream"):
        events = response.text.removesuffix("\n\n").split("\n\n")
        assert events[-1] == "data: [DONE]"
        assert not [event for event in events[:-1] if "error" in json.loads(event.removeprefix("data: "))]
    elif media == "application/json":
        assert isinstance(response.json(), dict)


def play(server: Server, label: str, mode: GenerationMode, count: int) -> None:
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(case=OPERATIONS[label].as_strategy(generation_mode=mode))
    def once(case: Any) -> None:
        if mode is GenerationMode.POSITIVE and isinstance(case.body, dict):
            case.body["model"] = None                       # else nearly every body is a 404
        check(case.call(base_url=server.url, timeout=HANG_S))
    once()
    server.assert_idle()


@pytest.mark.parametrize("mode", MODES, ids=["valid", "invalid"])
@pytest.mark.parametrize("label", POSTS)
def test_bodies(short: Server, label: str, mode: GenerationMode) -> None:
    play(short, label, mode, 6)


@pytest.mark.parametrize("label", sorted(set(OPERATIONS) - set(POSTS)))
def test_other_routes(short: Server, label: str) -> None:
    play(short, label, GenerationMode.POSITIVE, 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=["valid", "invalid"])
@pytest.mark.parametrize("label", POSTS)
def test_many_bodies(short: Server, label: str, mode: GenerationMode) -> None:
    play(short, label, mode, 400)
