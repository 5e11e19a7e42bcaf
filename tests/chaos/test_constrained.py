"""Constrained streams survive the death of each stage as plain ones do: the matcher is made again from the history."""
from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from tests.chaos.streams import gather, undisturbed
from tests.chaos.test_deaths import STAGES, kill
from tests.serving import Server
from tests.waiting import until

WORDS = r"[a-z]{20,60}( [0-9]{10,40}){2}"
GRAMMARS: tuple[dict[str, Any], ...] = (
    {"guided_regex": WORDS}, {"structured_outputs": {"regex": WORDS}, "n": 2, "temperature": 1.0, "seed": 3},
    {"structured_outputs": {"grammar": 'root ::= ("ab" [0-9]{12} "\\n"){8}'}, "logprobs": 1},
    {"structured_outputs": {"json": {
        "type": "array", "minItems": 12, "maxItems": 14, "items": {"type": "integer", "minimum": 1000, "maximum": 99999}}}})


@pytest.mark.parametrize("stage", STAGES)
def test_death_in_mid_stream(slow_null: Server, stage: str) -> None:
    requests = [{"model": "null", "prompt": f"Number {n}", "temperature": 0, "max_tokens": 300, "stream": True,
                 "stream_options": {"include_usage": True}, **grammar} for n, grammar in enumerate(GRAMMARS * 2)]
    requests += [{"model": "null", "prompt": "free", "temperature": 0, "max_tokens": 60, "ignore_eos": True, "stream": True}]
    clean = undisturbed(asyncio.run(gather(slow_null.url, requests)))
    hurt = asyncio.run(gather(slow_null.url, requests, disturb=lambda: kill(slow_null, stage)))
    assert undisturbed(hurt) == clean
    for one in hurt[:1]:
        assert re.fullmatch(WORDS, one.texts[0]) and one.finishes[0] == ["stop"]
    until(lambda: slow_null.get("/ready")[0] == 200, 60, "ready again")
