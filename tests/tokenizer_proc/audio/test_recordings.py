"""Recordings through a real decoder worker: windows under credit, hostile files, the worker's death, aborts."""
from __future__ import annotations

import os
import signal
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import WhisperFeatureExtractor

from pipeline.config import ModelConfig
from pipeline.errors import QuartetError
from pipeline.messages import Route, SpeechAdd, SubmitAudio, pack_ids
from pipeline.params import SamplingParams, SpeechParams
from pipeline.schema import BadFrame
from tests.tokenizer_proc.audio.sounds import tone, write
from tests.waiting import until
from tokenizer_proc.audio import recordings as module
from tokenizer_proc.audio.process import DecoderProcess
from tokenizer_proc.audio.recordings import Recordings

PARAMS = SpeechParams("transcribe", None, "", "", False, False, [0.0], SamplingParams())


class Desk:
    """A tokenizer's recordings with everything that they say."""

    def __init__(self, model: Path, max_seconds: float = 600.0) -> None:
        self.sent: list[SpeechAdd] = []
        self.failed: dict[int, QuartetError] = {}
        self.lives: list[DecoderProcess] = []
        self.held = Recordings((ModelConfig(names=("w",), path=str(model), task="transcribe"),), max_seconds,
                               lambda to, message, size: self.sent.append(message), self.failed.__setitem__, self._start)

    def _start(self) -> DecoderProcess:
        self.lives.append(DecoderProcess())
        return self.lives[-1]

    def submit(self, rid: int, path: Path, credit: int = 99, done: tuple[int, ...] = (), deadline_ns: int = 0) -> None:
        self.held.submit(SubmitAudio(rid, Route(0, 1, 0, 1, 0, 0), 0, str(path), PARAMS, credit, pack_ids(array("I", done)),
                                     deadline_ns))

    def turn_until(self, condition: Callable[[], Any]) -> None:
        def turned() -> bool:
            self.held.turn()
            self.held.assert_invariants()
            return bool(condition())
        until(turned, 60.0)

    def windows(self, rid: int) -> list[int]:
        return [add.window.index for add in self.sent if add.rid == rid]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    WhisperFeatureExtractor().save_pretrained(path)
    return path


@pytest.fixture
def desk(model: Path) -> Iterator[Desk]:
    made = Desk(model)
    yield made
    made.held.close()


def test_ragged_numbers_of_windows_are_a_bad_frame(desk: Desk) -> None:
    with pytest.raises(BadFrame):
        desk.held.submit(SubmitAudio(1, Route(0, 1, 0, 1, 0, 0), 0, "/nowhere", PARAMS, 1, b"\0\0\0", 0))
    assert not len(desk.held)


def test_windows_travel_with_their_features(desk: Desk, model: Path, tmp_path: Path) -> None:
    sound = tone(40)
    desk.submit(1, write(tmp_path / "a.wav", sound))
    desk.turn_until(lambda: not len(desk.held))
    first, second = (add.window for add in desk.sent)
    assert (first.index, first.last, second.index, second.last) == (0, False, 1, True)
    assert first.start_s == 0 and second.start_s == first.seconds and abs(first.seconds + second.seconds - 40) < 1e-6
    cut = round(first.seconds * 16_000)
    expected = WhisperFeatureExtractor()(sound[cut:], sampling_rate=16_000, return_tensors="np").input_features[0]
    np.testing.assert_allclose(second.features, expected, atol=0.02)            # the file has 16 bits
    assert not desk.failed


def test_no_window_is_made_before_it_is_granted(desk: Desk, tmp_path: Path) -> None:
    desk.submit(1, write(tmp_path / "a.wav", tone(100)), credit=1)
    desk.submit(2, write(tmp_path / "b.wav", tone(1)))
    desk.turn_until(lambda: desk.windows(2))
    assert desk.windows(1) == [0] and len(desk.held) == 1 and desk.held.next_timer_ns() is None
    desk.held.grant(1, 99)
    desk.turn_until(lambda: not len(desk.held))
    assert desk.windows(1) == list(range(len(desk.windows(1))))


def test_what_is_done_is_not_sent_again(desk: Desk, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(100))
    desk.submit(1, path)
    desk.turn_until(lambda: not len(desk.held))
    desk.submit(2, path, done=(0, 2))
    desk.turn_until(lambda: not len(desk.held))
    assert desk.windows(2) == [i for i in desk.windows(1) if i not in (0, 2)]


def test_a_bad_file_fails_its_own_request_only(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "bad.wav").write_bytes(b"RIFF\0\0\0\0WAVEnonsense")
    (tmp_path / "list.mp3").write_bytes(b"#EXTM3U\nfile:///etc/passwd\n")
    for rid, name in ((1, "bad.wav"), (2, "list.mp3"), (3, "missing.wav")):
        desk.submit(rid, tmp_path / name)
    desk.submit(4, write(tmp_path / "good.wav", tone(1)))
    desk.turn_until(lambda: not len(desk.held))
    assert set(desk.failed) == {1, 2, 3} and desk.windows(4) == [0] and len(desk.lives) == 1
    assert all(error.status == 400 and error.param == "file" for error in desk.failed.values())


def test_a_recording_that_is_too_long_is_refused(model: Path, tmp_path: Path) -> None:
    desk = Desk(model, max_seconds=5)
    try:
        desk.submit(1, write(tmp_path / "a.flac", np.zeros(16_000 * 6, np.float32)))
        desk.turn_until(lambda: desk.failed)
        assert "longer than the 5 seconds" in desk.failed[1].message
    finally:
        desk.held.close()


def test_when_the_worker_dies_at_a_file_the_others_go_on(desk: Desk, tmp_path: Path) -> None:
    """The one that it was at is refused; the other continues in a new worker where it was."""
    desk.submit(1, write(tmp_path / "a.wav", tone(100)), credit=1)
    desk.turn_until(lambda: desk.windows(1))
    desk.submit(2, write(tmp_path / "b.wav", tone(1)))
    os.kill(desk.lives[0].pid, signal.SIGSTOP)
    desk.held.turn()                                         # asks for the window of 2, which nobody answers
    desk.held.grant(1, 99)
    os.kill(desk.lives[0].pid, signal.SIGKILL)
    desk.turn_until(lambda: not len(desk.held))
    assert set(desk.failed) == {2} and len(desk.lives) == 2
    assert desk.windows(1) == list(range(len(desk.windows(1)))) and len(desk.windows(1)) > 1


def test_a_worker_that_dies_idle_is_replaced_and_nobody_blamed(desk: Desk, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(1))
    desk.submit(1, path)
    desk.turn_until(lambda: not len(desk.held))
    desk.lives[0]._process.kill()
    desk.lives[0]._process.wait()
    desk.submit(2, path)
    desk.turn_until(lambda: not len(desk.held))
    assert desk.windows(2) == [0] and not desk.failed


def test_a_worker_that_hangs_is_replaced(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.submit(1, write(tmp_path / "a.wav", tone(1)))
    desk.turn_until(lambda: desk.windows(1))
    monkeypatch.setattr(module, "COMMAND_NS", 0)
    os.kill(desk.lives[0].pid, signal.SIGSTOP)
    desk.submit(2, tmp_path / "a.wav")
    desk.turn_until(lambda: desk.failed)
    assert set(desk.failed) == {2}


def test_aborts_and_deadlines_end_a_recording(desk: Desk, tmp_path: Path) -> None:
    path = write(tmp_path / "a.wav", tone(100))
    desk.submit(1, path, credit=1)
    desk.turn_until(lambda: desk.windows(1))
    assert desk.held.forget(1) and not desk.held.forget(1) and not len(desk.held)
    desk.submit(2, path, deadline_ns=time.monotonic_ns() - 1)
    desk.held.turn()
    assert desk.failed[2].code == "timeout"
    desk.submit(3, path)
    desk.turn_until(lambda: not len(desk.held))
    assert desk.windows(3)[-1] >= 3


def test_the_worker_can_write_no_file_and_has_a_limit_of_memory(desk: Desk, tmp_path: Path) -> None:
    desk.submit(1, write(tmp_path / "a.wav", tone(1)))
    desk.turn_until(lambda: desk.windows(1))
    limits = dict(line.rsplit(None, 3)[0:1] + [line.split()[-3]] for line in
                  Path(f"/proc/{desk.lives[0].pid}/limits").read_text().splitlines()[1:] if line.split()[-1] in ("bytes",))
    assert limits["Max address space"] == str(2 * 2**30) and limits["Max file size"] == "0"
