"""Real Whisper weights and real speech through the whole server: texts, times, translations. Referee: transformers."""
from __future__ import annotations

import re
import wave
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import openai
import pytest

from benchmarks.speech import error_rate, join, reference, words_of
from tests import speech_packages
from tests.e2e.test_speech import cues
from tests.serving import Server

CLIPS = 3


def serve(model: Path, *args: str) -> Iterator[openai.OpenAI]:
    with Server("--served-model-name", "whisper", *args, model=str(model)) as server:
        with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=300) as client:
            yield client
        server.assert_idle()


@pytest.fixture(scope="module")
def tiny() -> Iterator[openai.OpenAI]:
    yield from serve(speech_packages.tiny_en())


@pytest.fixture(scope="module")
def base() -> Iterator[openai.OpenAI]:
    yield from serve(speech_packages.base())


def hear(client: openai.OpenAI, path: Path, **asked: object) -> str:
    return client.audio.transcriptions.create(model="whisper", file=path, **asked).text    # type: ignore[call-overload]


def test_texts_are_those_of_transformers(tiny: openai.OpenAI) -> None:
    clips = speech_packages.librivox()[:CLIPS]
    assert [hear(tiny, path) for path, _ in clips] == reference(str(speech_packages.tiny_en()), clips, "en")


@pytest.mark.slow
def test_texts_of_a_multilingual_model_are_those_of_transformers(base: openai.OpenAI) -> None:
    clips = speech_packages.librivox()
    assert [hear(base, path, language="en") for path, _ in clips] == reference(str(speech_packages.base()), clips, "en")


def test_every_form_of_a_longer_recording(tiny: openai.OpenAI, tmp_path: Path) -> None:
    """Two windows: what is said, and when, in every form and as a stream."""
    clips, path = speech_packages.librivox(), tmp_path / "long.wav"
    said = join(clips, 40, path)

    def create(**asked: object) -> object:
        return tiny.audio.transcriptions.create(model="whisper", file=path, **asked)       # type: ignore[call-overload]

    text = create().text
    assert error_rate(text, said) < 0.06
    assert create(response_format="text") == text + "\n"
    events = list(create(stream=True))
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) == 2 and "".join(deltas) == events[-1].text == text
    told = create(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert error_rate(told.text, said) < 0.06 and words_of(" ".join(w.word for w in told.words)) == words_of(told.text)
    assert all(0 <= w.start <= w.end <= told.duration for w in told.words)
    assert all(a.start <= b.start and a.end <= b.end for a, b in zip(told.words, told.words[1:]))
    assert all(-1 < s.avg_logprob < 0 and 0 < s.no_speech_prob < 1 and 0 < s.compression_ratio < 2.4 for s in told.segments)
    for form in ("srt", "vtt"):
        found = cues(create(response_format=form), form)
        times = [(start, end) for start, end, _ in found]
        assert error_rate(" ".join(text for _, _, text in found), said) < 0.06
        assert all(start < end for start, end in times) and all(a[1] <= b[0] for a, b in zip(times, times[1:]))
        assert abs(times[0][0] - told.words[0].start) < 0.3 and abs(times[-1][1] - told.words[-1].end) < 0.3


def test_an_english_model_translates_nothing(tiny: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="cannot translate"):
        tiny.audio.translations.create(model="whisper", file=speech_packages.librivox()[0][0])


@pytest.mark.slow
def test_french_is_recognised_and_translated(base: openai.OpenAI) -> None:
    path = speech_packages.french()
    told = base.audio.transcriptions.create(model="whisper", file=path, response_format="verbose_json")
    assert told.language == "fr" and {"installé", "téléphone"} <= set(re.findall(r"\w+", told.text.lower()))
    english = base.audio.translations.create(model="whisper", file=path).text.lower()
    assert {"congratulations", "installed"} <= set(words_of(english)), english


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [600])
def test_ten_minutes_are_heard_without_losing_or_doubling_words(
        tiny: openai.OpenAI, tmp_path: Path, seconds: int) -> None:
    path = tmp_path / "long.wav"
    said = join(speech_packages.librivox(), seconds, path)
    assert error_rate(hear(tiny, path), said) < 0.02


def test_silence_and_noise_are_not_speech(tiny: openai.OpenAI, tmp_path: Path) -> None:
    path, noise = tmp_path / "silence.wav", np.random.default_rng(0).standard_normal(16_000 * 3)
    with wave.open(str(path), "wb") as out:
        out.setparams((1, 2, 16_000, 0, "NONE", ""))
        out.writeframes((noise * 30).astype("<i2").tobytes())
    assert len(hear(tiny, path).split()) <= 2
