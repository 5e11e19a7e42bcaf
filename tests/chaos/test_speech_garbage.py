"""Broken recordings over HTTP: each is a transcript, a 400 or a 413, and nothing but the decoder worker takes harm."""
from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from tests.engine_proc.speech_tiny import make_whisper
from tests.serving import STAGES, Server
from tests.tokenizer_proc.audio.sounds import tone, write

FORMATS = ("a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.webm")
LIMIT_MB = 1
GROWTH_BYTES = 96 * 2**20
HOUR_S = 3600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = make_whisper(tmp_path_factory.mktemp("model") / "whisper")
    with Server("--served-model-name", "speech", "--threads", "1", "--max-audio-clip-filesize-mb", str(LIMIT_MB),
                model=str(directory)) as made:
        yield made
        made.assert_idle(10)


def mutations(folder: Path, count: int) -> Iterator[bytes]:
    """`count` broken files of all formats in turn: bytes changed in the header or anywhere, cut off, or far too large."""
    rng = random.Random(7)
    whole = [write(folder / name, tone(0.6, rate=48_000), 48_000).read_bytes() for name in FORMATS]
    for number in range(count):
        broken = bytearray(whole[number % len(whole)])
        for _ in range(rng.choice((1, 4, 64))):
            broken[rng.randrange(len(broken) if number % 4 else min(200, len(broken)))] = rng.randrange(256)
        if number % 3 == 0:
            broken = broken[:rng.randrange(1, len(broken))]
        if number % 50 == 49:
            broken += bytes(LIMIT_MB * 2**20)
        yield bytes(broken)


def post(server: Server, data: bytes) -> httpx.Response:
    return httpx.post(server.url + "/v1/audio/transcriptions", files={"file": ("a", data)}, timeout=120,
                      data={"model": "speech", "language": "en", "max_completion_tokens": "2"})


def resident(server: Server) -> dict[str, int]:
    """Bytes in memory of each stage, by its folder."""
    return {stage: sum(psutil.Process(pid).memory_info().rss for pid in server.pids(stage)) for stage in STAGES}


@pytest.mark.parametrize("count", [60, pytest.param(300, marks=pytest.mark.slow)])
def test_broken_files_hurt_nobody(server: Server, tmp_path: Path, count: int) -> None:
    good = write(tmp_path / "good.wav", tone(1.0)).read_bytes()
    assert post(server, good).status_code == 200
    before, pids = resident(server), {stage: server.pids(stage) for stage in STAGES}
    seen: Counter[int] = Counter()
    for data in mutations(tmp_path, count):
        answer = post(server, data)
        seen[answer.status_code] += 1
        if answer.status_code != 200:
            assert answer.json()["error"]["param"] == "file" and answer.json()["error"]["message"].endswith(".")
    print(dict(seen))
    assert set(seen) == {200, 400, 413} and seen[400] > count // 4
    assert {stage: server.pids(stage) for stage in STAGES} == pids
    assert all(after < before[stage] + GROWTH_BYTES for stage, after in resident(server).items())
    assert post(server, good).status_code == 200


@pytest.mark.slow
def test_an_hour_is_streamed_in_bounded_memory(server: Server, tmp_path: Path) -> None:
    """Its passages come one by one, in order, long before its end is decoded; nobody holds the whole of it."""
    swell = np.sin(np.arange(HOUR_S * 8000) / 8000 * 0.9).astype(np.float32) * 0.2
    path = write(tmp_path / "hour.mp3", swell, 8000)
    with Server("--served-model-name", "speech", "--threads", "2", model=server.args[1]) as other:
        post(other, write(tmp_path / "good.wav", tone(90.0)).read_bytes())
        before, most, times = resident(other), dict.fromkeys(STAGES, 0), []
        with open(path, "rb") as file, httpx.stream(
                "POST", other.url + "/v1/audio/transcriptions", files={"file": ("a.mp3", file)}, timeout=600,
                data={"model": "speech", "language": "en", "stream": "true", "max_completion_tokens": "3", "seed": "1",
                      "stream_include_usage": "true", "stream_continuous_usage_stats": "true"}) as answer:
            for line in answer.iter_lines():
                if '"transcript.text.delta"' in line:
                    times.append(line)
                    most = {stage: max(most[stage], size) for stage, size in resident(other).items()}
        print(len(times), {stage: (most[stage] - before[stage]) >> 20 for stage in STAGES})
        assert len(times) > 20 and all(most[stage] < before[stage] + 2 * GROWTH_BYTES for stage in STAGES)
