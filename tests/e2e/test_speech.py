"""Speech beside chat and embeddings in one server, with the official client and as the documentation shows it.

The Whisper here is tiny and random: what it hears is nonsense, but the same nonsense each time. See test_whisper.py for
real weights.
"""
from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import webvtt

from tests.e2e.test_docs import BLOCK, PLACE, run
from tests.e2e.test_many_models import engine
from tests.engine_proc.speech_tiny import make_whisper
from tests.serving import ROOT, Server, gguf
from tests.tokenizer_proc.audio.sounds import write
from tests.waiting import until

BERT = str(ROOT / "examples/models/bert-tiny-sentiment")
PAGE = ROOT / "docs/endpoints/audio.md"
SECONDS = 75


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("speech")
    whisper = make_whisper(place / "whisper")
    (place / "quartet.yaml").write_text(json.dumps({"crash-limit": 50, "models": [
        {"name": "chat", "path": str(gguf()), "null-engine": "hash", "null-step": 0.005},
        {"name": "embedder", "path": BERT, "task": "embed", "null-engine": "dimension=8"},
        {"name": "whisper", "path": str(whisper), "threads": 1}]}))
    with Server("--config", str(place / "quartet.yaml")) as made:
        yield made
        made.assert_idle(10)


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise that swells and fades, long enough for several windows."""
    noise = np.random.default_rng(0).standard_normal(SECONDS * 16_000)
    swell = np.sin(np.arange(len(noise)) / 16_000 * 0.9) ** 2
    return write(tmp_path_factory.mktemp("audio") / "speech.wav", (noise * swell * 0.25).clip(-1, 1).astype(np.float32))


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def cues(subtitles: str, form: str) -> list[tuple[float, float, str]]:
    """(start in seconds, end, text), as a parser of others reads them."""
    return [(*(sum(float(part) * unit for part, unit in zip(time.split(":"), (3600, 60, 1), strict=True))
               for time in (cue.start, cue.end)), cue.text) for cue in webvtt.from_buffer(StringIO(subtitles), format=form)]


def transcribe(client: openai.OpenAI, recording: Path, **asked: Any) -> Any:
    """With a seed: what is doubtful, as everything here is, is tried again at random."""
    return client.audio.transcriptions.create(model="whisper", file=recording, language="en", extra_body={"seed": 3}, **asked)


def test_all_models_are_listed_with_what_they_are_for(server: Server) -> None:
    assert [(e["id"], e["task"]) for e in server.get("/v1/models")[1]["data"]] == [
        ("chat", "generate"), ("embedder", "embed"), ("whisper", "transcribe")]


def test_every_form_tells_the_same(client: openai.OpenAI, recording: Path) -> None:
    text = transcribe(client, recording).text
    verbose = transcribe(client, recording, response_format="verbose_json", timestamp_granularities=["segment", "word"])
    assert text and transcribe(client, recording, response_format="text") == text + "\n"
    assert verbose.duration == SECONDS and verbose.language == "en" and "".join(
        segment.text for segment in verbose.segments).strip() == verbose.text
    for told in (verbose.segments, verbose.words):
        times = [time for item in told for time in (item.start, item.end)]
        assert times == sorted(times) and 0 <= times[0] and times[-1] <= SECONDS
    srt, vtt = (cues(transcribe(client, recording, response_format=form), form) for form in ("srt", "vtt"))
    times = [time for start, end, _ in vtt for time in (start, end)]
    assert vtt and srt == vtt and times == sorted(times)


def test_a_long_recording_is_told_passage_by_passage(client: openai.OpenAI, recording: Path) -> None:
    """One delta for each window in which something is said, as soon as it is known; together the text."""
    events = list(transcribe(client, recording, stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) >= 2 and events[-1].type == "transcript.text.done"
    assert "".join(deltas).strip() == events[-1].text == transcribe(client, recording).text


def test_the_language_is_detected_and_translations_are_made(client: openai.OpenAI, recording: Path) -> None:
    told = client.audio.transcriptions.create(model="whisper", file=recording, response_format="verbose_json")
    assert told.language in ("en", "de")
    translated = client.audio.translations.create(model="whisper", file=recording)
    assert translated.text and translated.text != told.text


def test_models_do_not_take_each_others_requests(client: openai.OpenAI, recording: Path) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.audio.transcriptions.create(model="embedder", file=recording)
    assert refused.value.param == "model"
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="whisper", prompt="hi")


def test_the_death_of_the_speech_engine_is_no_business_of_the_others(
        server: Server, client: openai.OpenAI, recording: Path) -> None:
    """A chat stream goes on, embeddings are made, and the transcript is the one that would have come."""
    expected = transcribe(client, recording).text
    victim = engine(server, 2)
    with ThreadPoolExecutor(2) as pool:
        chat = pool.submit(lambda: sum(bool(c.choices[0].text) for c in client.completions.create(
            model="chat", prompt="hi", max_tokens=200, stream=True, extra_body={"ignore_eos": True})))
        events = iter(transcribe(client, recording, stream=True))
        parts = [next(events).delta]
        os.kill(victim, signal.SIGKILL)
        vector = client.embeddings.create(model="embedder", input="hi").data[0].embedding
        parts += [event.delta for event in events if event.type == "transcript.text.delta"]
        assert "".join(parts).strip() == expected and len(vector) == 8 and chat.result(60) > 0
    until(lambda: server.get("/ready") == (200, {
        "status": "ok", "missing": [], "models": {"chat": True, "embedder": True, "whisper": True}}), 60, "all ready again")


def test_the_examples_of_the_page_work(server: Server, recording: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(recording.parent)
    text = PAGE.read_text()
    examples = list(BLOCK.finditer(text))
    assert len(examples) >= 2
    for match in examples:
        name = f"{PAGE.name}:{text[:match.start()].count(chr(10)) + 1}"
        shown = run(match.group(1), match.group(2).replace(PLACE, server.url), name)
        assert shown.strip() and '{"error":{"message"' not in shown


def test_fields_come_in_any_order_and_files_without_a_name(server: Server, recording: Path) -> None:
    """As the clients of Home Assistant and of subtitle tools send them."""
    data = recording.read_bytes()
    parts = [("file", ("audio", data, "application/octet-stream")), ("language", (None, "en")), ("seed", (None, "3")),
             ("model", (None, "whisper"))]
    answers = [httpx.post(server.url + "/v1/audio/transcriptions", files=order, timeout=120).json()["text"]
               for order in (parts, parts[::-1])]
    assert answers[0] and answers[0] == answers[1]
