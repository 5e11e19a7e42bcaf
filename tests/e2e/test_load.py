"""Concurrent streams through the whole pipeline: none fails, gauges go back to zero. The long run is behind a marker."""
from __future__ import annotations

import asyncio
import json
import time

import httpx
import pytest

from tests.serving import Server


async def one_stream(client: httpx.AsyncClient, url: str, model: str, number: int, tokens: int) -> int:
    body = {"model": model, "prompt": f"{number} words " * 20, "max_tokens": tokens, "stream": True, "ignore_eos": True,
            "temperature": 0, "stream_options": {"include_usage": True}}
    last, usage = "", None
    async with client.stream("POST", url + "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                last = line[6:]
                if last != "[DONE]":
                    usage = json.loads(last).get("usage") or usage
    assert last == "[DONE]" and usage["completion_tokens"] == tokens
    return tokens


async def load(url: str, model: str, streams: int, seconds: float, tokens: int) -> int:
    end, done = time.monotonic() + seconds, 0
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        async def worker(start: int) -> None:
            nonlocal done
            number = start
            while time.monotonic() < end:
                await one_stream(client, url, model, number, tokens)
                number += streams
                done += 1
        await asyncio.gather(*(worker(i) for i in range(streams)))
    return done


def test_many_streams_through_the_pipeline(null: Server) -> None:
    assert asyncio.run(load(null.url, "null", streams=64, seconds=4, tokens=64)) >= 64
    null.assert_idle()


def test_32_streams_on_the_real_model(smollm: Server) -> None:
    assert asyncio.run(load(smollm.url, "smollm2", streams=32, seconds=5, tokens=16)) >= 32
    smollm.assert_idle()


@pytest.mark.slow
def test_32_streams_for_a_minute(smollm: Server) -> None:
    assert asyncio.run(load(smollm.url, "smollm2", streams=32, seconds=60, tokens=64)) >= 32
    smollm.assert_idle()
