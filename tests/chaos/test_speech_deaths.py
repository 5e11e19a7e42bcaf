"""A process dies under a long recording: the transcript is the one that would have come, each passage exactly once."""
from __future__ import annotations

import json
import os
import signal
import wave
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.engine_proc.speech_tiny import make_whisper
from tests.serving import Server
from tests.waiting import until

SECONDS = 400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = make_whisper(tmp_path_factory.mktemp("model") / "whisper")
    with Server("--crash-limit", "1000", "--served-model-name", "speech", "--threads", "1", model=str(directory)) as server:
        yield server
        server.assert_idle(10)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that swells and fades, so that every window says something of its own."""
    path, noise = tmp_path_factory.mktemp("audio") / "noise.wav", np.random.default_rng(0)
    swell = np.sin(np.arange(SECONDS * 16_000) / 16_000 * 0.9) ** 2
    with wave.open(str(path), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(16_000)
        out.writeframes((noise.standard_normal(SECONDS * 16_000) * swell * 8000).clip(-32768, 32767).astype("<i2").tobytes())
    return path


def transcript(server: Server, recording: Path, disturb: Callable[[], None] = lambda: None) -> str:
    """The text of a stream; `disturb` is called at its first passage."""
    parts: list[str] = []
    with open(recording, "rb") as stream, httpx.stream(
            "POST", server.url + "/v1/audio/transcriptions", timeout=120, files={"file": ("noise.wav", stream)},
            data={"model": "speech", "stream": "true", "language": "en", "seed": "3"}) as answer:
        assert answer.status_code == 200
        lines = [line for line in answer.iter_lines() if line.startswith("data: ") and _hear(line, parts, disturb)]
    assert lines[-1] == "data: [DONE]"
    done = json.loads(lines[-2].removeprefix("data: "))
    assert done["type"] == "transcript.text.done" and done["text"] == "".join(parts).strip()
    return "".join(parts)


def _hear(line: str, parts: list[str], disturb: Callable[[], None]) -> bool:
    if line != "data: [DONE]":
        event = json.loads(line.removeprefix("data: "))
        if event.get("type") == "transcript.text.delta":
            parts.append(event["delta"])
            if len(parts) == 1:
                disturb()
    return True


@pytest.mark.parametrize("stage", ["tokenizer_proc", "engine_proc"])
def test_a_transcript_survives_the_death_of_a_stage(server: Server, recording: Path, stage: str) -> None:
    clean = transcript(server, recording)
    (pid,) = server.pids(stage)
    assert transcript(server, recording, lambda: os.kill(pid, signal.SIGKILL)) == clean
    until(lambda: server.get("/ready")[0] == 200, 60, "ready again")
    assert pid not in server.pids(stage)


def test_a_client_that_leaves_takes_its_recording_along(server: Server, recording: Path) -> None:
    class Gone(Exception):
        pass

    def leave() -> None:
        raise Gone

    with pytest.raises(Gone):
        transcript(server, recording, leave)
    server.assert_idle(10)
    until(lambda: not [p for p in Path(server.run_dir).rglob("*") if p.is_file() and p.stat().st_size > 10**6], 10,
          "the spool file deleted")
