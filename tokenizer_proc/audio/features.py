"""A window's samples -> what a model's encoder takes: a log-mel spectrogram as Whisper's, or the samples themselves.

The numbers are those of transformers' WhisperFeatureExtractor, whose class would load torch. Run by the decoder worker.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import librosa
import numpy as np

from tokenizer_proc.audio.decode import RATE
from tokenizer_proc.audio.split import WINDOW

MAX_JSON_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class LogMel:
    """Log-mel features, float32 [mels, 3000] for thirty seconds, the rest being silence."""

    window: np.ndarray                       # float64 [n_fft]: Hann
    filters: np.ndarray                      # float32 [mels, n_fft / 2 + 1]
    hop: int

    @classmethod
    def make(cls, mels: int, n_fft: int = 400, hop: int = 160) -> LogMel:
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
        return cls(hann, librosa.filters.mel(sr=RATE, n_fft=n_fft, n_mels=mels).astype(np.float32), hop)

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        n_fft, frames = len(self.window), WINDOW // self.hop
        padded = np.zeros(WINDOW, np.float32)
        padded[:len(samples)] = samples
        padded = np.pad(padded, n_fft // 2, mode="reflect")
        # Frames that lie in the silence behind the samples are all equal: they are computed once.
        heard = min(frames, (len(samples) + n_fft) // self.hop + 1)
        strided = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::self.hop][:heard]
        spectrum = np.fft.rfft(strided * self.window)
        power = (spectrum.real ** 2 + spectrum.imag ** 2).astype(np.float32)
        mel = np.full((len(self.filters), frames), -10.0, np.float32)
        mel[:, :heard] = np.log10(np.maximum(self.filters @ power.T, 1e-10))
        np.maximum(mel, mel.max() - 8.0, out=mel)
        mel += 4.0
        mel /= 4.0
        return mel


@dataclass(frozen=True, slots=True)
class Raw:
    """The samples, float32 [n], as they are or with mean 0 and variance 1."""

    normalised: bool

    def __call__(self, samples: np.ndarray) -> np.ndarray:
        if not self.normalised:
            return samples
        spread = np.sqrt(samples.var(dtype=np.float64) + 1e-7)
        return ((samples - samples.mean(dtype=np.float64)) / spread).astype(np.float32)


def extractor(model: Path) -> LogMel | Raw:
    """What the checkpoint in `model` needs, by its preprocessor_config.json or the like; ValueError if it has none."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = model / name
        if path.is_file() and path.stat().st_size <= MAX_JSON_BYTES:
            told = json.loads(path.read_text())
            told = told.get("feature_extractor", told)
            if "feature_extractor_type" in told:
                break
    else:
        raise ValueError("the checkpoint does not say what its encoder takes")
    if told.get("sampling_rate", RATE) != RATE:
        raise ValueError("only models of 16 kHz are supported")
    if told["feature_extractor_type"] == "WhisperFeatureExtractor":
        return LogMel.make(int(told.get("feature_size", 80)), int(told.get("n_fft", 400)), int(told.get("hop_length", 160)))
    if told["feature_extractor_type"] == "Wav2Vec2FeatureExtractor":
        return Raw(bool(told.get("do_normalize", True)))
    raise ValueError(f"the feature extractor {told['feature_extractor_type']} is not known")
