"""An audio file of a user -> 16 kHz mono samples, a chunk at a time.

Run by the decoder worker only, which has limits of memory and time: the libraries here parse hostile bytes. Formats are
found by content, from a fixed list, so that no playlist and no network protocol is ever followed. Raises `BadAudio`
with a sentence for the user. WAV, FLAC, OGG and MP3 go through libsndfile, containers and the rest through FFmpeg.
"""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import soundfile
import soxr
from av.container import InputContainer

RATE = 16_000
CHUNK = 65_536                       # frames of a file that are decoded at once
MAX_CHANNELS = 8
MIN_RATE, MAX_RATE = 4_000, 192_000
# What a file begins with: (offset, bytes) -> how FFmpeg's demuxer for it is called, "" for libsndfile.
SIGNATURES = (
    (0, b"RIFF", ""), (0, b"RF64", ""), (0, b"fLaC", ""), (0, b"ID3", ""), (0, b"OggS", ""), (4, b"ftyp", "mov"),
    (0, b"\x1a\x45\xdf\xa3", "matroska"))


class BadAudio(Exception):
    """A file that cannot be transcribed, with a sentence for the user."""


def samples(path: Path, max_seconds: float) -> Iterator[np.ndarray]:
    """float32 mono chunks at `RATE`. BadAudio for what is no audio, or longer than `max_seconds`."""
    budget = int(max_seconds * RATE)
    seen = 0
    for chunk in _resampled(path, max_seconds):
        seen += len(chunk)
        if seen > budget:
            raise too_long(max_seconds)
        if len(chunk):
            yield chunk
    if not seen:
        raise BadAudio("The audio file holds no sound.")


def too_long(max_seconds: float) -> BadAudio:
    return BadAudio(f"The recording is longer than the {max_seconds:g} seconds that this server takes.")


def _resampled(path: Path, max_seconds: float) -> Iterator[np.ndarray]:
    stream: soxr.ResampleStream | None = None
    for rate, chunk in _decoded(path, max_seconds):
        if rate == RATE:
            yield chunk
            continue
        stream = stream or soxr.ResampleStream(rate, RATE, 1, dtype="float32", quality="HQ")
        yield stream.resample_chunk(chunk)
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _decoded(path: Path, max_seconds: float) -> Iterator[tuple[int, np.ndarray]]:
    """(sampling rate, mono chunk) pairs; the rate does not change within a file."""
    with path.open("rb") as opened:
        head = opened.read(16)
    if not head:
        raise BadAudio("The audio file is empty.")
    demuxer = next((name for offset, magic, name in SIGNATURES if head[offset:offset + len(magic)] == magic), None)
    if demuxer is None and head[0] == 0xFF and head[1:2] and head[1] & 0xE0 == 0xE0:
        demuxer = "aac" if head[1] & 0xF6 == 0xF0 else ""
    if demuxer is None:
        raise BadAudio("The file is in no audio format that this server reads: send flac, m4a, mp3, mp4, mpeg, mpga, "
                       "ogg, wav or webm.")
    if demuxer == "":
        try:
            with soundfile.SoundFile(str(path)) as file:
                rate, channels, frames, form = file.samplerate, file.channels, file.frames, file.format
        except soundfile.SoundFileError:
            if head[:4] != b"OggS" and head[:3] != b"ID3" and head[0] != 0xFF:
                raise BadAudio("The audio file is damaged: its header cannot be read.") from None
            demuxer = "ogg" if head[:4] == b"OggS" else "mp3"          # Opus with odd layouts, MP3 with odd tags
        else:
            _check(rate, channels)
            if form != "MP3" and frames > max_seconds * rate and _honest(form, frames, path):
                raise too_long(max_seconds)
            yield from _by_soundfile(path)
            return
    yield from _by_ffmpeg(path, demuxer)


def _honest(form: str, frames: int, path: Path) -> bool:
    """Whether a header's length can be believed: WAV streams often claim four gigabytes."""
    return form not in ("WAV", "WAVEX", "RF64") or frames <= path.stat().st_size


def _check(rate: int, channels: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise BadAudio(f"The sampling rate of the audio file must be between {MIN_RATE} and {MAX_RATE} Hz.")
    if not 1 <= channels <= MAX_CHANNELS:
        raise BadAudio(f"The audio file must have between 1 and {MAX_CHANNELS} channels.")


def _by_soundfile(path: Path) -> Iterator[tuple[int, np.ndarray]]:
    got = 0
    try:
        with soundfile.SoundFile(str(path)) as file:
            while True:
                chunk = file.read(CHUNK, dtype="float32", always_2d=True)
                if not len(chunk):
                    return
                got += len(chunk)
                yield file.samplerate, _mono(chunk.T)
    except soundfile.SoundFileError:
        if not got:                                  # a file that breaks off is transcribed as far as it goes
            raise BadAudio("The audio file is damaged: no sound can be decoded.") from None


def _by_ffmpeg(path: Path, demuxer: str) -> Iterator[tuple[int, np.ndarray]]:
    got = 0
    try:
        # The file is opened here, so that FFmpeg is given bytes and no name to interpret.
        with path.open("rb") as raw, av.open(
                raw, format=demuxer, options={"protocol_whitelist": ""}, metadata_errors="replace") as container:
            assert isinstance(container, InputContainer)
            if not container.streams.audio:
                raise BadAudio("The file has no audio track.")
            track = container.streams.audio[0]
            _check(track.codec_context.sample_rate, track.codec_context.channels)
            rate = track.codec_context.sample_rate
            resampler = av.AudioResampler(format="fltp", layout="mono", rate=rate)
            for frame in container.decode(track):
                if frame.samples > MAX_RATE * 10:
                    raise BadAudio("The audio file is damaged: a frame claims more sound than a frame can hold.")
                for plain in resampler.resample(frame):
                    got += plain.samples
                    yield rate, plain.to_ndarray()[0]
    except av.FFmpegError:
        if not got:
            raise BadAudio("The audio file is damaged: no sound can be decoded.") from None


def _mono(channels: np.ndarray) -> np.ndarray:
    """[channels, n] -> [n], their mean; what is no number is silence."""
    mono = channels[0] if len(channels) == 1 else channels.mean(axis=0)
    return np.ascontiguousarray(np.nan_to_num(mono, nan=0.0, posinf=0.0, neginf=0.0), np.float32)
