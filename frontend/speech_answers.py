"""Transcripts as json, text, verbose_json, SubRip and WebVTT, and as streamed events.

Run by the frontend; pure functions of the windows that came back.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from frontend.recordings import RecordingRequest
from frontend.speech_params import SpeechAsk
from frontend.sse import DONE
from frontend.wire import dump, dump_ascii
from pipeline.messages import SpeechSegment, Transcribed, unpack_ids

POSITIONS_PER_SECOND = 50            # what the encoder makes of a second: counted as the prompt's tokens
FRAMES_PER_SECOND = 100
TYPES = {"json": "application/json", "verbose_json": "application/json", "text": "text/plain; charset=utf-8",
         "srt": "application/x-subrip; charset=utf-8", "vtt": "text/vtt; charset=utf-8"}


def body(ask: SpeechAsk, request: RecordingRequest) -> bytes:
    """The whole answer of a request that ended well, in the form asked for."""
    windows = request.results()
    if ask.form == "text":
        return (text_of(windows) + "\n").encode()
    if ask.form == "srt":
        return "".join(f"{i}\n{_clock(s.start_s, ',')} --> {_clock(s.end_s, ',')}\n{_line(s)}\n\n"
                       for i, s in enumerate(_cues(windows), 1)).encode()
    if ask.form == "vtt":
        return ("WEBVTT\n\n" + "".join(f"{_clock(s.start_s, '.')} --> {_clock(s.end_s, '.')}\n{_line(s)}\n\n"
                                       for s in _cues(windows))).encode()
    answer: dict[str, Any] = {"text": text_of(windows)}
    if ask.form == "verbose_json":
        answer = {"task": ask.task, "language": request.language or "en", "duration": round(_duration(windows), 3), **answer}
        answer["segments"] = _segments(windows) if ask.segments else None
        answer["words"] = [{"word": w.text.strip(), "start": round(w.start_s, 3), "end": round(w.end_s, 3),
                            "probability": round(w.probability, 4)}
                           for window in windows for s in window.segments for w in s.words] if ask.words else None
    if ask.task == "transcribe":
        answer["usage"] = {"type": "duration", "seconds": math.ceil(_duration(windows))}
    return dump(answer)


def text_of(windows: Iterable[Transcribed]) -> str:
    return "".join(segment.text for window in windows for segment in window.segments).strip()


def _duration(windows: list[Transcribed]) -> float:
    return max((w.start_s + w.seconds for w in windows), default=0.0)


def _segments(windows: list[Transcribed]) -> list[dict[str, Any]]:
    pairs = [(window, segment) for window in windows for segment in window.segments]
    return [{
        "id": i, "seek": round(window.start_s * FRAMES_PER_SECOND), "start": round(s.start_s, 3), "end": round(s.end_s, 3),
        "text": s.text, "tokens": list(unpack_ids(s.ids)), "temperature": s.temperature,
        "avg_logprob": _finite(s.avg_logprob), "compression_ratio": _finite(s.compression_ratio),
        "no_speech_prob": _finite(s.no_speech_prob)} for i, (window, s) in enumerate(pairs)]


def _finite(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _cues(windows: list[Transcribed]) -> Iterator[SpeechSegment]:
    """Segments that subtitles can show."""
    return (s for window in windows for s in window.segments if s.text.strip() and s.end_s > s.start_s)


def _line(segment: SpeechSegment) -> str:
    """Text of a cue: no empty line, which would end it, and no arrow, which would begin one."""
    return " ".join(segment.text.split()).replace("-->", "->")


def _clock(seconds: float, mark: str) -> str:
    millis = round(seconds * 1000)
    return f"{millis // 3_600_000:02d}:{millis // 60_000 % 60:02d}:{millis // 1000 % 60:02d}{mark}{millis % 1000:03d}"


class SpeechStream:
    """Events that are OpenAI's and vLLM's at once: `type` and `delta` for the one, `choices` for the other."""

    def __init__(self, ask: SpeechAsk, request: RecordingRequest, identity: dict[str, Any]) -> None:
        self._ask, self._request = ask, request
        kind = "transcription.chunk" if ask.task == "transcribe" else "translation.chunk"
        self._head = {"id": identity["id"], "object": kind, "created": identity["created"], "model": ask.model}
        self._parts: list[str] = []
        self._seconds, self._tokens = 0.0, 0

    def events(self, updates: Sequence[Transcribed]) -> bytes:
        data = b""
        for window in updates:
            self._seconds = window.start_s + window.seconds
            self._tokens += window.tokens
            text = "".join(s.text for s in window.segments)
            if not self._parts:
                text = text.lstrip()
            if text:
                self._parts.append(text)
                data += self._event("transcript.text.delta", {"delta": text}, {"content": text}, None)
        return data

    def end(self) -> bytes:
        usage = self._usage()
        told = {"text": "".join(self._parts).rstrip(), "usage": {
            "type": "tokens", "input_tokens": usage["prompt_tokens"], "output_tokens": usage["completion_tokens"],
            **usage}}
        data = self._event("transcript.text.done", told, {"content": ""}, "stop")
        if self._ask.include_usage:
            data += _data({**self._head, "choices": [], "usage": usage})
        return data + DONE

    def _event(self, kind: str, told: dict[str, Any], delta: dict[str, str], finish: str | None) -> bytes:
        choice = {"delta": delta, "finish_reason": finish, "stop_reason": None}
        chunk = {**self._head, "type": kind, **told, "choices": [choice]}
        if self._ask.continuous_usage:
            chunk.setdefault("usage", self._usage())
        return _data(chunk)

    def _usage(self) -> dict[str, int]:
        prompt = math.ceil(self._seconds * POSITIONS_PER_SECOND)
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}


def _data(value: dict[str, Any]) -> bytes:
    return f"data: {dump_ascii(value)}\n\n".encode()
