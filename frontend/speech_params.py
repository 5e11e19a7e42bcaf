"""Validated forms to what the table computes and how the transcript is written.

Everything that depends on the model is checked here, before the recording is looked at. Run by the frontend; pure
functions of the form, the configuration and what the model's engine said about itself.
"""
from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frontend.bodies import validate
from frontend.choose import choose
from frontend.recordings import RecordingSpec
from frontend.speech_schema import SpeechBody, TranscriptionBody, TranslationBody, values
from frontend.stages import Stages
from frontend.upload import Form
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError, invalid
from pipeline.params import SamplingParams, SpeechParams

STEP = 0.2                           # between the temperatures of one passage
U64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechAsk:
    """A request as its handler sees it."""

    spec: RecordingSpec
    stream: bool
    task: str                            # transcribe | translate
    model: str                           # the served name that answers carry
    label: str | None                    # the caller's own id, from the form
    form: str                            # json | text | verbose_json | srt | vtt
    segments: bool                       # verbose_json tells the times of segments ...
    words: bool                          # ... and of words
    include_usage: bool
    continuous_usage: bool


def ask(task: str, upload: Form, config: ServerConfig, stages: Stages) -> SpeechAsk:
    schema: type[SpeechBody] = TranscriptionBody if task == "transcribe" else TranslationBody
    body = validate(schema, values(upload.fields))
    number = choose(config, body.model, ("transcribe",), "transcribe recordings")
    facts, name = stages.facts(number), config.models[number].names[0]
    granularities = body.timestamp_granularities
    if granularities and body.response_format != "verbose_json":
        raise invalid("'timestamp_granularities' needs 'response_format' to be verbose_json.", "timestamp_granularities")
    if body.stream and body.response_format not in ("json", "text"):
        raise invalid(f"'response_format' {body.response_format} cannot be streamed: use json.", "response_format")
    for option in ("stream_include_usage", "stream_continuous_usage_stats"):
        if getattr(body, option) and not body.stream:
            raise invalid(f"'{option}' needs 'stream' to be true.", option)
    timestamps = body.response_format in ("verbose_json", "srt", "vtt")
    words = "word" in granularities
    _check_model(body, task, facts, name, timestamps, words)
    # Subtitles stand where words are said, not where the model rounds a segment to.
    aligned = words or (body.response_format in ("srt", "vtt") and facts.get("words") is True)
    params = SpeechParams(
        task=task, language=body.language, prompt=body.prompt, hotwords=body.hotwords, timestamps=timestamps, words=aligned,
        temperatures=_ladder(body.temperature), sampling=_sampling(body, config))
    spec = RecordingSpec(model=number, path=str(upload.path), num_bytes=upload.size, params=params,
                         deadline_ns=time.monotonic_ns() + int(config.http.request_timeout_s * 1e9))
    return SpeechAsk(
        spec=spec, stream=body.stream, task=task, model=name, label=body.request_id, form=body.response_format, words=words,
        segments=not granularities or "segment" in granularities, include_usage=body.stream_include_usage,
        continuous_usage=body.stream_include_usage and body.stream_continuous_usage_stats)


def _check_model(body: SpeechBody, task: str, facts: Mapping[str, Any], name: str, timestamps: bool, words: bool) -> None:
    """QuartetError for what this model cannot do. Before its engine has told, the engine itself is asked."""
    languages = facts.get("languages")
    if body.language is not None and isinstance(languages, list) and body.language not in (languages or ["en"]):
        known = ", ".join(languages) if languages else "en"
        raise invalid(f"'language' must be a code of a language that the model '{name}' knows: {known}.", "language")
    if task == "translate":
        if facts.get("translates") is False:
            raise QuartetError("unsupported_parameter", f"The model '{name}' cannot translate.", "model")
        if body.to_language not in (None, "en"):
            raise invalid("'to_language' must be en: Whisper models translate into English only.", "to_language")
    elif body.to_language is not None and body.to_language != body.language:
        raise invalid("'to_language' is for translations: use /v1/audio/translations.", "to_language")
    if timestamps and facts.get("timestamps") is False:
        raise QuartetError("unsupported_parameter", f"The model '{name}' tells no times, so that 'response_format' "
                                                    f"{body.response_format} is not available.", "response_format")
    if words and facts.get("words") is False:
        raise QuartetError("unsupported_parameter", f"The model '{name}' cannot tell the times of words.",
                           "timestamp_granularities")
    for field in ("prompt", "hotwords"):
        if getattr(body, field) and facts.get("prompts") is False:
            raise QuartetError("unsupported_parameter", f"The model '{name}' takes no '{field}'.", field)


def _ladder(first: float) -> list[float]:
    """The temperatures of one passage: the one asked for, then steps up to 1."""
    steps = [first]
    while steps[-1] + STEP <= 1.0 + 1e-6:
        steps.append(round(steps[-1] + STEP, 6))
    return steps


def _sampling(body: SpeechBody, config: ServerConfig) -> SamplingParams:
    seed = body.seed if body.seed not in (None, -1) else config.seed
    return SamplingParams(
        temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p,
        seed=secrets.randbits(64) if seed is None else seed & U64, max_tokens=body.max_completion_tokens or 0,
        presence_penalty=body.presence_penalty, frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty)
