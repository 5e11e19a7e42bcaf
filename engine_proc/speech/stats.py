"""The speech engine's Prometheus metrics: those of the text engine for its sequences, and what is special to audio.

Engine process, no torch.
"""
from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter

from engine_proc.scheduler import Scheduler
from engine_proc.stats import Stats


class SpeechStats(Stats):
    """Counts for one speech engine."""

    def __init__(self, registry: CollectorRegistry, model_name: str, index: int, scheduler: Scheduler,
                 max_model_len: int) -> None:
        super().__init__(registry, model_name, index, scheduler, max_model_len)
        labels = {"model_name": model_name, "engine": str(index)}

        def counter(name: str, help: str) -> Counter:
            return Counter(name, help, list(labels), registry=registry).labels(**labels)

        self._audio_s = counter("quartet:audio_seconds", "Seconds of sound that were encoded.")
        self._windows = counter("quartet:audio_windows", "Windows that were encoded.")
        self._encode_s = counter("quartet:audio_encode_seconds", "Time that encoding took.")
        self.fallbacks = counter("quartet:audio_fallbacks", "Attempts that were tried again at another temperature.")

    def encoded(self, audio_s: float, taken_s: float) -> None:
        self._windows.inc()
        self._audio_s.inc(audio_s)
        self._encode_s.inc(taken_s)
