"""The speech engine's door: what a window must satisfy. Engine process, no torch.

What it refuses is a `QuartetError` for the user. Must never raise anything else for bytes that decoded to a SpeechAdd.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from engine_proc.admission import check_sampling
from engine_proc.speech.fallback import ATTEMPTS
from engine_proc.speech.vocabulary import Vocabulary
from pipeline.errors import QuartetError, invalid
from pipeline.messages import AudioWindow, SpeechAdd

MAX_WINDOWS = 1 << 20
MAX_SECONDS = 30.5
MAX_SAMPLES = int(MAX_SECONDS * 16_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeechLimits:
    """What this engine can serve. `mels`: 0 for models that take samples."""

    vocabulary: Vocabulary
    vocab_size: int
    mels: int
    max_waiting: int


def check(add: SpeechAdd, limits: SpeechLimits, num_requests: int) -> None:
    """QuartetError when `add` cannot be served. `num_requests`: those held besides it."""
    params, vocabulary = add.params, limits.vocabulary
    if params.task not in ("transcribe", "translate"):
        raise invalid("The task must be 'transcribe' or 'translate'.", "task")
    if params.task == "translate" and (not vocabulary.multilingual or vocabulary.translate < 0):
        raise invalid("This model cannot translate; it only transcribes.", "model")
    if params.language is not None and vocabulary.multilingual and params.language not in vocabulary.languages:
        raise invalid("This model does not know that language.", "language")
    if params.words and not vocabulary.alignment_heads:
        raise invalid("This model gives no word times.", "timestamp_granularities")
    if not 1 <= len(params.temperatures) <= ATTEMPTS or not all(0 <= t <= 2 for t in params.temperatures):
        raise invalid("'temperature' must be between 0 and 2.", "temperature")
    check_sampling(params.sampling, limits.vocab_size)
    if len(add.done) % 4:
        raise invalid("Window numbers must be 32-bit integers.", "file")
    _check_window(add.window, limits.mels)
    if num_requests >= limits.max_waiting:
        raise QuartetError("server_overloaded", "The server has more to do than it can queue; retry soon.")


def _check_window(window: AudioWindow, mels: int) -> None:
    data = window.features
    fits = data.shape == (mels, 3000) if mels else data.ndim == 1 and 0 < len(data) <= MAX_SAMPLES
    if data.dtype != np.float32 or not fits:
        raise invalid("The audio does not have the form that this model takes.", "file")
    if (window.index >= MAX_WINDOWS or not math.isfinite(window.start_s) or not 0 < window.seconds <= MAX_SECONDS
            or not np.isfinite(data).all()):
        raise invalid("The audio holds values that are no sound.", "file")
