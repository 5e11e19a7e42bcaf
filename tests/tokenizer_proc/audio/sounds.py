"""Sounds for tests: tones and silence as samples, and as files of every format."""
from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import soundfile

RATE = 16_000


def tone(seconds: float, pitch: float = 440.0, rate: int = RATE, loud: float = 0.3) -> np.ndarray:
    return (loud * np.sin(2 * np.pi * pitch * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    """By the file's extension; samples [n] or [n, channels]."""
    if path.suffix in (".wav", ".flac", ".ogg", ".mp3"):
        soundfile.write(path, samples, rate)
        return path
    codec = {".m4a": "aac", ".mp4": "aac", ".webm": "libopus", ".opus": "libopus"}[path.suffix]
    flat = samples.reshape(len(samples), -1).T
    with av.open(str(path), "w", format={".m4a": "ipod", ".opus": "ogg"}.get(path.suffix)) as container:
        stream = container.add_stream(codec, rate=rate, layout="mono" if len(flat) == 1 else "stereo")
        for start in range(0, flat.shape[1], 960):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(flat[:, start:start + 960]), format="fltp",
                                               layout="mono" if len(flat) == 1 else "stereo")
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
