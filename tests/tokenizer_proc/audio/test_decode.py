"""Files of users: every format gives the same sound, and nothing hostile gives anything but one sentence."""
from __future__ import annotations

import random
import struct
from pathlib import Path

import numpy as np
import pytest

from tests.tokenizer_proc.audio.sounds import tone, write
from tokenizer_proc.audio.decode import RATE, BadAudio, samples


def decoded(path: Path, max_seconds: float = 60.0) -> np.ndarray:
    return np.concatenate(list(samples(path, max_seconds)))


def pitch(sound: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(sound * np.hanning(len(sound))))
    return float(np.argmax(spectrum) * RATE / len(sound))


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.mp4", "a.webm", "a.opus"])
@pytest.mark.parametrize(("rate", "channels"), [(48_000, 1), (16_000, 2)])
def test_every_format_gives_the_same_sound(tmp_path: Path, name: str, rate: int, channels: int) -> None:
    sound = tone(1.5, 440.0, rate)
    path = write(tmp_path / name, sound if channels == 1 else np.stack([sound, sound], axis=1), rate)
    found = decoded(path)
    assert abs(len(found) / RATE - 1.5) < 0.12 and abs(pitch(found) - 440) < 2
    assert 0.15 < np.abs(found[RATE // 2:RATE]).max() < 0.45


def test_wave_is_decoded_exactly_and_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tone(0.5, 300), tone(0.5, 900)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1))
    np.testing.assert_allclose(decoded(path), (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 22_050, 44_100, 96_000])
def test_resampling_keeps_length_and_pitch(tmp_path: Path, rate: int) -> None:
    found = decoded(write(tmp_path / "a.wav", tone(2.0, 440, rate), rate))
    assert abs(len(found) - 2 * RATE) <= 32 and abs(pitch(found) - 440) < 1


def test_formats_are_found_by_content_not_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.flac", tone(0.5)).rename(tmp_path / "a.mp3")
    assert len(decoded(path)) == RATE // 2


PLAYLISTS = (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", b"ffconcat version 1.0\nfile /etc/passwd\n",
             b"#EXTM3U\nhttp://127.0.0.1:1/a.mp3\n", b"[playlist]\nFile1=/etc/passwd\n", b"<?xml version='1.0'?><MPD></MPD>",
             b"v=0\no=- 0 0 IN IP4 127.0.0.1\n", b"root:x:0:0:root:/root:/bin/bash\n", b"\0" * 4096, b"x")


@pytest.mark.parametrize("content", PLAYLISTS, ids=lambda c: c[:12].decode(errors="replace"))
def test_playlists_and_other_files_are_no_audio(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.mp3"
    path.write_bytes(content)
    with pytest.raises(BadAudio, match="format"):
        decoded(path)


def test_empty_and_soundless_files(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(b"")
    with pytest.raises(BadAudio, match="empty"):
        decoded(tmp_path / "a.wav")
    with pytest.raises(BadAudio, match="no sound"):
        decoded(write(tmp_path / "b.wav", np.zeros(0, np.float32)))
    assert len(decoded(write(tmp_path / "c.wav", np.zeros(1, np.float32)))) == 1


def test_length_is_limited_by_the_header_and_by_what_comes(tmp_path: Path) -> None:
    silence = write(tmp_path / "a.flac", np.zeros(120 * RATE, np.float32))
    assert silence.stat().st_size < 100_000
    with pytest.raises(BadAudio, match="longer than the 60 seconds"):
        decoded(silence, 60.0)
    opus = write(tmp_path / "a.opus", np.zeros(3 * 48_000, np.float32), 48_000)
    with pytest.raises(BadAudio, match="longer"):
        decoded(opus, 2.0)


def test_a_header_that_claims_four_gigabytes_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(0.5))
    data = bytearray(path.read_bytes())
    at = data.index(b"data")
    data[at + 4:at + 8] = struct.pack("<I", 0xFFFFFFFF)
    path.write_bytes(data)
    assert abs(len(decoded(path)) - RATE // 2) <= 2


@pytest.mark.parametrize(("rate", "channels"), [(1000, 1), (768_000, 1), (16_000, 64)])
def test_odd_rates_and_channels_are_refused(tmp_path: Path, rate: int, channels: int) -> None:
    path = write(tmp_path / "a.wav", np.zeros((rate // 10, channels), np.float32), rate)
    with pytest.raises(BadAudio, match="rate|channels"):
        decoded(path)


def test_values_that_are_no_numbers_are_silence(tmp_path: Path) -> None:
    import soundfile
    sound = tone(0.1)
    sound[100:200] = np.nan
    sound[300] = np.inf
    soundfile.write(tmp_path / "a.wav", sound, RATE, subtype="FLOAT")
    assert np.isfinite(decoded(tmp_path / "a.wav")).all()


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.m4a", "a.webm"])
def test_mutated_files_are_sound_or_one_sentence(tmp_path: Path, name: str) -> None:
    """34 mutations of each of six formats: 204 files."""
    data, rng = write(tmp_path / name, tone(0.6, rate=48_000), 48_000).read_bytes(), random.Random(name)
    for number in range(34):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 4, 64))):
            broken[rng.randrange(len(broken) if number % 2 else min(200, len(broken)))] = rng.randrange(256)
        if number % 3 == 0:
            broken = broken[:rng.randrange(1, len(broken))]
        path = tmp_path / f"mutated{path_suffix(name)}"
        path.write_bytes(broken)
        try:
            found = decoded(path)
            assert np.isfinite(found).all() and len(found) <= 60 * RATE
        except BadAudio as error:
            assert str(error).endswith(".")


def path_suffix(name: str) -> str:
    return name[name.index("."):]
