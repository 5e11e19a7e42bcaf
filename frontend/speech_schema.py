"""The forms of POST /v1/audio/transcriptions and /v1/audio/translations.

Values of forms are text, so that these models convert what they check. What a field means is decided in
frontend.speech_params. Run by the frontend; holds no state.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, StringConstraints

from frontend.fields import Body, MinP, NumTokens, Penalty, RepetitionPenalty, RequestId, Seed, TopK, TopP
from pipeline.errors import unsupported

LISTS = ("timestamp_granularities",)
MAX_PROMPT_CHARS = 16_384
Language = Annotated[str, StringConstraints(min_length=2, max_length=16, to_lower=True)]
Words = Annotated[str, StringConstraints(max_length=MAX_PROMPT_CHARS)]
# Known, and refused unless the value is one of those given here, which ask for nothing.
REFUSED: Mapping[str, tuple[str, ...]] = {
    "include": (), "chunking_strategy": ("auto",), "known_speaker_names": (), "known_speaker_references": (),
    "use_beam_search": ("false", "0"), "n": ("1",), "length_penalty": ("1", "1.0"),
    "include_stop_str_in_output": ("false", "0"), "watermarking": ("false", "0"), "vllm_xargs": ("{}",)}


class SpeechBody(Body):
    """What both forms have in common, beside the file."""

    model_config = ConfigDict(strict=False, extra="ignore", allow_inf_nan=False, protected_namespaces=())
    HONOURS: ClassVar[frozenset[str]] = frozenset({"response_format"})

    model: str | None = None
    language: Language | None = Field(None, description="ISO 639-1 code of what is spoken (default: the model tells)")
    prompt: Words = Field("", description="what was said before, or an example of the wanted style")
    hotwords: Words = Field("", description="words and names that are likely to come")
    response_format: Literal["json", "text", "verbose_json", "srt", "vtt"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = Field(
        0.0, description="where to begin; doubtful passages are tried again at higher ones")
    top_p: TopP = 1.0
    top_k: TopK = 0
    min_p: MinP = 0.0
    seed: Seed | None = None
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    max_completion_tokens: NumTokens | None = Field(None, description="of each thirty seconds")
    timestamp_granularities: list[Literal["word", "segment"]] = Field(
        [], description="what verbose_json tells the times of (default: segment)")
    to_language: Language | None = None
    stream: bool = False
    stream_include_usage: bool = False
    stream_continuous_usage_stats: bool = False
    request_id: RequestId | None = None


class TranscriptionBody(SpeechBody):
    """POST /v1/audio/transcriptions."""


class TranslationBody(SpeechBody):
    """POST /v1/audio/translations."""


def values(fields: Mapping[str, list[str]]) -> dict[str, Any]:
    """A form's fields as a body: the last value of each, lists where lists belong; empty ones count as not given."""
    for name, allowed in REFUSED.items():
        if any(value and value.lower() not in allowed for value in fields.get(name, ())):
            raise unsupported(name)
    found: dict[str, Any] = {}
    for name, many in fields.items():
        given = [value for value in many if value and name not in REFUSED]
        if name in LISTS:
            found[name] = [part.strip() for value in given for part in value.split(",")]
        elif given:
            found[name] = given[-1]
    return found
