"""Clients for chaos tests: what each caller saw, in a form that can be compared with an undisturbed run."""
from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

TIMEOUT = httpx.Timeout(120)


@dataclass
class Seen:
    """Everything that one caller saw of one request."""

    status: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    finishes: dict[int, list[str]] = field(default_factory=dict)
    logprobs: dict[int, list[float]] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    done: int = 0
    error: dict[str, Any] | None = None
    headers: dict[str, str] = field(default_factory=dict)
    comments: int = 0
    longest_gap_s: float = 0.0

    def answer(self) -> tuple[Any, ...]:
        """What must not depend on any death."""
        usage = self.usage and {k: self.usage[k] for k in ("prompt_tokens", "completion_tokens", "total_tokens")}
        return self.texts, self.finishes, self.logprobs, self.ids, usage, self.error

    def take(self, choice: dict[str, Any]) -> None:
        index = choice["index"]
        self.texts[index] = self.texts.get(index, "") + (choice.get("text") or "")
        if choice.get("finish_reason"):
            self.finishes.setdefault(index, []).append(choice["finish_reason"])
        if choice.get("logprobs"):
            self.logprobs.setdefault(index, []).extend(round(v, 3) for v in choice["logprobs"]["token_logprobs"])
        if choice.get("token_ids"):
            self.ids.setdefault(index, []).extend(choice["token_ids"])


async def ask(client: httpx.AsyncClient, url: str, body: dict[str, Any],
              on_chunk: Callable[[int], None] = lambda count: None) -> Seen:
    """One completion, streamed if the body says so; `on_chunk` hears the number of chunks with text so far."""
    seen, loop, chunks = Seen(), asyncio.get_running_loop(), 0
    if not body.get("stream"):
        answer = await client.post(url + "/v1/completions", json=body)
        seen.status, seen.headers, value = answer.status_code, dict(answer.headers), answer.json()
        for choice in value.get("choices", []):
            seen.take(choice)
        seen.usage, seen.error, seen.done = value.get("usage"), value.get("error"), 1
        return seen
    last = loop.time()
    async with client.stream("POST", url + "/v1/completions", json=body) as answer:
        seen.status, seen.headers = answer.status_code, dict(answer.headers)
        async for line in answer.aiter_lines():
            if line.startswith(":"):
                seen.comments += 1
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                seen.done += 1
                continue
            value = json.loads(line[6:])
            seen.error = value.get("error") or seen.error
            seen.usage = value.get("usage") or seen.usage
            for choice in value.get("choices", []):
                seen.take(choice)
            chunks += 1
            now = loop.time()
            seen.longest_gap_s, last = max(seen.longest_gap_s, now - last), now
            on_chunk(chunks)
    return seen


def bodies(model: str, count: int, tokens: int, *, stream: bool = True) -> list[dict[str, Any]]:
    """Requests of all kinds in turn: greedy, seeded, n > 1, with logprobs, with a stop string, plain answers."""
    kinds: list[dict[str, Any]] = [
        {}, {"temperature": 0.8, "seed": 7}, {"n": 2, "temperature": 1.0, "seed": 3}, {"logprobs": 2},
        {"stop": ["\x00never"], "return_token_ids": True},
        {"presence_penalty": 0.5, "repetition_penalty": 1.2, "min_tokens": tokens // 2}]
    made = []
    for number in range(count):
        body: dict[str, Any] = {"model": model, "prompt": f"Story number {number}: once upon a time", "temperature": 0,
                                "max_tokens": tokens, "ignore_eos": True, **kinds[number % len(kinds)]}
        if stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        made.append(body)
    return made


async def gather(url: str, requests: list[dict[str, Any]], disturb: Callable[[], Any] | None = None,
                 after_chunks: int = 3) -> list[Seen]:
    """All requests at once; `disturb` is called once when every streamed one has `after_chunks` chunks."""
    waiting = {number for number, body in enumerate(requests) if body.get("stream")}
    async with httpx.AsyncClient(timeout=TIMEOUT, limits=httpx.Limits(max_connections=None)) as client:
        def on_chunk(number: int, count: int) -> None:
            nonlocal disturb
            if count >= after_chunks:
                waiting.discard(number)
            if not waiting and disturb is not None:
                act, disturb = disturb, None
                act()
        tasks = [asyncio.create_task(ask(client, url, body, lambda count, n=n: on_chunk(n, count)))
                 for n, body in enumerate(requests)]
        return await asyncio.gather(*tasks)


def undisturbed(seen: list[Seen]) -> list[tuple[Any, ...]]:
    """The answers, each checked to have ended exactly once."""
    for one in seen:
        assert one.status == 200 and one.error is None and one.done == 1, one
        assert all(len(reasons) == 1 for reasons in one.finishes.values()) and one.finishes
    return [one.answer() for one in seen]
