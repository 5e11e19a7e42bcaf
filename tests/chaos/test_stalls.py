"""Stages that stand still: for a while, for too long, with work in hand; and those that only take their time."""
from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.chaos.streams import Seen, ask, bodies, gather, undisturbed
from tests.chaos.tools import PIPELINE, STAGES, null_server, sample, stopped
from tests.serving import Server, gguf
from tests.waiting import until

HANG_S = 2.0


@pytest.fixture(scope="module")
def patient() -> Iterator[Server]:
    """Stages may stand still for a minute; a quiet stream says so twice a second."""
    with null_server("--keep-alive-interval", "0.5", step_s=0.02) as server:
        yield server
        server.assert_idle(10)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Server]:
    """Stages that stand still for two seconds are replaced."""
    with null_server("--keep-alive-interval", "0.5", "--hang-timeout", str(HANG_S), "--crash-limit", "1000",
                     step_s=0.02) as server:
        yield server
        server.assert_idle(10)


def pids(server: Server) -> dict[str, list[int]]:
    return {stage: server.pids(stage) for stage in STAGES}


async def while_stopped(server: Server, stage: str, seconds: float) -> None:
    (pid,) = server.pids(stage)
    with stopped(pid):
        await asyncio.sleep(seconds)                                       # the stall itself


@pytest.mark.parametrize("seconds", [2, pytest.param(5, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_stands_still_loses_nothing(patient: Server, stage: str, seconds: float) -> None:
    requests, before = bodies("null", 6, 60), pids(patient)
    late = bodies("null", 1, 5)
    clean = undisturbed(asyncio.run(gather(patient.url, requests + late)))

    async def run() -> list[Seen]:
        stalls: list[asyncio.Task[list[Seen]]] = []

        async def stall() -> list[Seen]:
            task = asyncio.create_task(while_stopped(patient, stage, seconds))
            await asyncio.sleep(0)                                         # it stands
            answers = await gather(patient.url, late)                      # asked meanwhile
            await task
            return answers
        seen = await gather(patient.url, requests, lambda: stalls.append(asyncio.create_task(stall())))
        return seen + await stalls[0]
    hurt = asyncio.run(run())
    assert undisturbed(hurt) == clean
    assert pids(patient) == before
    if stage in ("engine_proc", "detok_proc"):
        for one in hurt[:len(requests)]:
            assert one.longest_gap_s > seconds / 2 and one.comments >= 1


def test_the_engine_goes_on_while_the_detokenizer_stands(patient: Server) -> None:
    request = bodies("null", 1, 60)
    clean = undisturbed(asyncio.run(gather(patient.url, request)))
    tokens = sample(patient, "vllm:generation_tokens_total")
    (pid,) = patient.pids("detok_proc")

    async def run() -> list[Seen]:
        task = asyncio.create_task(gather(patient.url, request))
        with stopped(pid):
            def all_computed() -> bool:
                return sample(patient, "vllm:generation_tokens_total") >= tokens + 60
            await asyncio.to_thread(until, all_computed, 30, "all tokens computed")
            assert not task.done()
        return await task
    assert undisturbed(asyncio.run(run())) == clean


def test_health_tells_of_a_stage_that_stands(patient: Server) -> None:
    (pid,) = patient.pids("engine_proc")
    with stopped(pid):
        until(lambda: patient.get("/health")[0] == 503, 20, "the stall noticed")
        assert patient.get("/ready")[1]["missing"] == ["engine.0"]
        assert patient.get("/live")[0] == 200
    until(lambda: patient.get("/health")[0] == 200, 20, "healthy again")
    assert patient.pids("engine_proc") == [pid]


def test_stages_that_stand_for_too_long_are_replaced_and_streams_go_on(impatient: Server) -> None:
    requests, before = bodies("null", 6, 60), pids(impatient)
    clean = undisturbed(asyncio.run(gather(impatient.url, requests)))

    def stand() -> None:
        for stage in PIPELINE:
            os.kill(before[stage][0], signal.SIGSTOP)
    hurt = asyncio.run(gather(impatient.url, requests, stand))
    assert undisturbed(hurt) == clean
    assert max(one.longest_gap_s for one in hurt) > HANG_S and all(one.comments for one in hurt)
    until(lambda: impatient.get("/ready")[0] == 200, 60, "ready again")
    after = pids(impatient)
    for stage in PIPELINE:
        assert after[stage] != before[stage] and len(after[stage]) == 1
    assert after["frontend"] == before["frontend"]


def test_a_frontend_that_stands_for_too_long_is_replaced(impatient: Server) -> None:
    before = pids(impatient)

    async def run() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            with pytest.raises(httpx.TransportError):                      # its connections are reset, as at a death
                await ask(client, impatient.url, bodies("null", 1, 2000)[0],
                          lambda count: freeze() if count == 3 else None)

    def freeze() -> None:
        os.kill(before["frontend"][0], signal.SIGSTOP)
    asyncio.run(run())
    undisturbed(asyncio.run(gather(impatient.url, bodies("null", 1, 5))))  # queued by the kernel, answered by the next
    after = pids(impatient)
    assert after["frontend"] != before["frontend"]
    assert {stage: after[stage] for stage in PIPELINE} == {stage: before[stage] for stage in PIPELINE}
    impatient.assert_idle(10)


def test_a_loop_that_hangs_with_work_is_dumped_and_replaced() -> None:
    body = {"model": "null", "prompt": [1000], "temperature": 0, "ignore_eos": True, "return_token_ids": True,
            "stream": True, "stream_options": {"include_usage": True}}
    with null_server("--hang-timeout", str(HANG_S), "--keep-alive-interval", "0.5", script="count;hang_at=40",
                     step_s=0.02) as server:
        (pid,) = server.pids("engine_proc")

        async def run() -> list[Seen]:
            task = asyncio.create_task(gather(server.url, [{**body, "max_tokens": 60}, {**body, "max_tokens": 35}]))
            await asyncio.to_thread(until, lambda: server.get("/health")[0] == 503, 30, "/health noticed the hang")
            return await task
        long, short = asyncio.run(run())
        assert undisturbed([long, short])
        assert long.ids[0] == list(range(1001, 1061)) and short.ids[0] == list(range(1001, 1036))
        assert long.longest_gap_s > HANG_S and long.comments
        until(lambda: server.get("/health")[0] == 200, 30, "healthy again")
        assert server.pids("engine_proc") != [pid]
        dump = (server.root / "logs" / "engine.0.out").read_text()
        assert re.search(r"Fatal Python error: Aborted", dump) and "engine_proc/null.py" in dump and "_hang" in dump
        assert any("has not turned" in line for line in server.lines)
        server.assert_idle()


async def healthy_meanwhile(server: Server, body: dict[str, object]) -> tuple[Seen, list[int], float]:
    """The answer, every status of /health while it was computed, and how long that took."""
    statuses, start = [], time.monotonic()
    async with httpx.AsyncClient(timeout=120) as client:
        task = asyncio.create_task(ask(client, server.url, body))
        while not task.done():
            statuses.append((await client.get(server.url + "/health")).status_code)
            await asyncio.wait([task], timeout=0.1)
        return await task, statuses, time.monotonic() - start


def test_a_long_legal_step_and_a_long_prefill_are_no_hang() -> None:
    """One step takes longer than a beacon stays fresh (3 s), the whole prefill longer than the hang timeout."""
    hang_s = 5.0
    with null_server("--hang-timeout", str(hang_s), "--max-num-seqs", "8", "--max-num-batched-tokens", "64",
                     step_s=3.3) as server:
        (pid,) = server.pids("engine_proc")
        body = {"model": "null", "prompt": list(range(1000, 1128)), "max_tokens": 1, "ignore_eos": True, "stream": True}
        seen, statuses, seconds = asyncio.run(healthy_meanwhile(server, body))
        undisturbed([seen])
        assert seconds > hang_s and set(statuses) == {200}
        assert server.pids("engine_proc") == [pid] and not any("replaced" in line for line in server.lines)
        server.assert_idle()


@pytest.mark.slow
def test_a_prompt_of_the_whole_context_in_one_step_is_no_hang() -> None:
    with Server("--dtype", "float32", "--kv-cache-memory-bytes", "512M", "--served-model-name", "smollm2",
                "--max-num-batched-tokens", "4096", "--max-prefill-chunk", "4096", model=str(gguf())) as server:
        body = {"model": "smollm2", "prompt": [1000 + n for n in range(2000)], "max_tokens": 4, "ignore_eos": True,
                "temperature": 0, "stream": True}
        seen, statuses, _ = asyncio.run(healthy_meanwhile(server, body))
        undisturbed([seen])
        assert set(statuses) == {200} and not any("replaced" in line for line in server.lines)
        server.assert_idle()
