"""One process dies in mid-work: every caller gets the text that it would have got, exactly once."""
from __future__ import annotations

import asyncio
import os
import random
import signal
from typing import Any

import httpx
import pytest

from tests.chaos.streams import Seen, ask, bodies, gather, undisturbed
from tests.serving import Server
from tests.waiting import until

STAGES = ("tokenizer_proc", "engine_proc", "detok_proc")
SIGNALS = (signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT)


def kill(server: Server, stage: str, number: int = signal.SIGKILL) -> int:
    (pid,) = server.pids(stage)
    os.kill(pid, number)
    return pid


def wait_replaced(server: Server, stage: str, old: int) -> None:
    until(lambda: (pids := server.pids(stage)) and old not in pids, 20, f"{stage} replaced")
    until(lambda: server.get("/ready")[0] == 200, 60, "ready again")


@pytest.mark.parametrize("stage", STAGES)
def test_death_when_idle_is_noticed_and_healed(slow_null: Server, stage: str) -> None:
    request = bodies("null", 1, 10)
    before = undisturbed(asyncio.run(gather(slow_null.url, request)))
    old = kill(slow_null, stage)
    after = undisturbed(asyncio.run(gather(slow_null.url, request)))     # accepted at once, answered after the restart
    assert after == before
    wait_replaced(slow_null, stage, old)


@pytest.mark.parametrize("count", [1, 32])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda s: s.name)
@pytest.mark.parametrize("stage", STAGES)
def test_death_in_mid_stream(slow_null: Server, stage: str, number: signal.Signals, count: int) -> None:
    requests = bodies("null", count, 60)
    clean = undisturbed(asyncio.run(gather(slow_null.url, requests)))
    hurt = asyncio.run(gather(slow_null.url, requests, disturb=lambda: kill(slow_null, stage, number)))
    assert undisturbed(hurt) == clean
    if stage != "engine_proc":
        assert max(one.longest_gap_s for one in hurt) < 5                  # a warm machine takes under 1.5 s: benchmarks/
    until(lambda: slow_null.get("/ready")[0] == 200, 60, "ready again")


@pytest.mark.parametrize("stage", STAGES)
def test_plain_answers_survive_too(slow_null: Server, stage: str) -> None:
    requests = [*bodies("null", 1, 60), *bodies("null", 12, 60, stream=False)]
    clean = undisturbed(asyncio.run(gather(slow_null.url, requests)))
    assert undisturbed(asyncio.run(gather(slow_null.url, requests, disturb=lambda: kill(slow_null, stage)))) == clean


@pytest.mark.parametrize("stage", STAGES)
def test_death_in_prefill(real: Server, stage: str) -> None:
    prompt = " ".join(str(n * 7919 % 1009) for n in range(700))
    body = {"model": "smollm2", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}

    async def run(disturb: bool) -> Seen:
        async with httpx.AsyncClient(timeout=120) as client:
            task = asyncio.create_task(ask(client, real.url, body))
            if disturb:
                while real.metric("vllm:num_requests_running") == 0 and not task.done():
                    await asyncio.sleep(0.02)
                kill(real, stage)
            return await task
    hurt = asyncio.run(run(True))
    clean = asyncio.run(run(False))
    assert undisturbed([hurt]) == undisturbed([clean])


@pytest.mark.parametrize("stage", STAGES)
def test_the_real_model_goes_on_with_the_same_text(real: Server, stage: str) -> None:
    requests = bodies("smollm2", 8, 48)
    clean = undisturbed(asyncio.run(gather(real.url, requests)))
    assert undisturbed(asyncio.run(gather(real.url, requests, disturb=lambda: kill(real, stage)))) == clean


def test_a_stop_string_found_after_the_death_still_stops(slow_null: Server) -> None:
    free = {**bodies("null", 1, 80)[0], "return_token_ids": True}
    text = asyncio.run(gather(slow_null.url, [free]))[0].texts[0]
    stop = text[len(text) // 2:len(text) // 2 + 4]
    for stage in STAGES:
        stopping = [{**free, "stop": [stop]}]
        hurt = asyncio.run(gather(slow_null.url, stopping, disturb=lambda stage=stage: kill(slow_null, stage)))
        assert hurt[0].texts[0] == text[:text.index(stop)] and hurt[0].finishes == {0: ["stop"]} and hurt[0].done == 1


def test_a_frontend_that_dies_takes_only_its_own_connections(slow_null: Server) -> None:
    body = bodies("null", 1, 400)[0]

    async def victim() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            with pytest.raises(httpx.TransportError):
                await ask(client, slow_null.url, body, lambda count: kill(slow_null, "frontend") if count == 3 else None)
    others = {stage: slow_null.pids(stage) for stage in STAGES}
    asyncio.run(victim())
    undisturbed(asyncio.run(gather(slow_null.url, bodies("null", 2, 10))))   # connections queue meanwhile
    assert {stage: slow_null.pids(stage) for stage in STAGES} == others
    slow_null.assert_idle(10)                                              # its work was aborted


def test_a_request_that_kills_its_engine_three_times_is_refused(slow_null: Server) -> None:
    body = bodies("null", 1, 3000)[0]
    bystander = bodies("null", 2, 100)[1]

    async def run() -> tuple[Seen, Seen]:
        async with httpx.AsyncClient(timeout=120) as client:
            kills = 0

            def on_chunk(count: int) -> None:
                nonlocal kills
                if kills < 3 and count >= 3 + kills * 20:
                    kills += 1
                    kill(slow_null, "engine_proc")
            poison = asyncio.create_task(ask(client, slow_null.url, body, on_chunk))
            other = asyncio.create_task(ask(client, slow_null.url, bystander))
            return await poison, await other
    poison, other = asyncio.run(run())
    assert poison.error and poison.error["code"] == "poisoned_request" and poison.done == 0
    assert other.error is None and other.done == 1
    until(lambda: slow_null.get("/ready")[0] == 200, 60, "ready again")


@pytest.mark.slow
def test_a_hundred_kills_at_random_moments(slow_null: Server) -> None:
    rng = random.Random(1)
    requests: list[dict[str, Any]] = bodies("null", 16, 120)
    clean = undisturbed(asyncio.run(gather(slow_null.url, requests)))
    for _ in range(100):
        stage = rng.choice(("tokenizer_proc", "detok_proc", "engine_proc"))
        until(lambda: slow_null.get("/ready")[0] == 200, 60, "ready")
        hurt = asyncio.run(gather(slow_null.url, requests, after_chunks=rng.randint(1, 60),
                                  disturb=lambda stage=stage: kill(slow_null, stage, rng.choice(SIGNALS))))
        assert undisturbed(hurt) == clean


def test_a_crash_loop_ends_the_server_with_code_5() -> None:
    from tests.serving import gguf
    server = Server("--null-engine", "hash", "--served-model-name", "null", model=str(gguf())).start()
    for _ in range(5):
        if server.process.poll() is not None:
            break
        pids = until(lambda: server.pids("detok_proc") or server.process.poll() is not None, 20)
        if pids is not True:
            os.kill(pids[0], signal.SIGKILL)
            until(lambda pids=pids: pids[0] not in server.pids("detok_proc"), 5)
    assert server.process.wait(30) == 5
    assert any(line.startswith("quartet: ") for line in server.lines)
    server.assert_nothing_left()
