"""Windows: every sample exactly once, none longer than thirty seconds, cut in pauses."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer_proc.audio.sounds import tone
from tokenizer_proc.audio.decode import RATE
from tokenizer_proc.audio.split import EARLIEST, WINDOW, pieces, quietest


@settings(max_examples=20)
@given(seconds=st.floats(0, 100), chunk=st.integers(1000, 2_000_000))
def test_every_sample_is_in_exactly_one_window(seconds: float, chunk: int) -> None:
    sound = np.random.default_rng(0).standard_normal(int(seconds * RATE)).astype(np.float32)
    found = list(pieces(sound[i:i + chunk] for i in range(0, len(sound), chunk)))
    np.testing.assert_array_equal(np.concatenate([p.samples for p in found]), sound)
    assert [p.index for p in found] == list(range(len(found)))
    assert [p.start for p in found] == list(np.cumsum([0, *[len(p.samples) for p in found[:-1]]]))
    assert [p.last for p in found] == [False] * (len(found) - 1) + [True]
    assert all(EARLIEST <= len(p.samples) <= WINDOW for p in found[:-1]) and len(found[-1].samples) <= WINDOW


def test_how_the_samples_were_grouped_changes_nothing() -> None:
    sound = np.random.default_rng(1).standard_normal(70 * RATE).astype(np.float32)
    one, many = ([len(p.samples) for p in pieces(sound[i:i + n] for i in range(0, len(sound), n))] for n in (len(sound), 999))
    assert one == many


@pytest.mark.parametrize("pause", [19.5, 23.0, 28.0])
def test_a_window_ends_in_the_pause(pause: float) -> None:
    sound = np.concatenate([tone(pause), np.zeros(RATE // 2, np.float32), tone(31 - pause)])
    assert pause <= quietest(sound[:WINDOW]) / RATE <= pause + 0.5


def test_of_two_equal_pauses_the_later_one_is_taken() -> None:
    sound = np.concatenate([tone(20), np.zeros(RATE // 2, np.float32), tone(6), np.zeros(RATE // 2, np.float32), tone(4)])
    assert 26.5 <= quietest(sound[:WINDOW]) / RATE <= 27.0


def test_a_gap_inside_of_a_word_is_no_pause() -> None:
    """80 ms of silence, as before a plosive, against half a second of quiet breath."""
    breath = 0.01 * np.random.default_rng(2).standard_normal(RATE // 2).astype(np.float32)
    sound = np.concatenate([tone(20), breath, tone(5), np.zeros(RATE * 8 // 100, np.float32), tone(6)])
    assert 20 <= quietest(sound[:WINDOW]) / RATE <= 20.5
