"""Times and texts: the warp against transformers' own, words from tokens, segments from timestamps."""
from __future__ import annotations

import numpy as np
import pytest
from transformers.models.whisper.generation_whisper import _dynamic_time_warping, _median_filter

from engine_proc.speech.align import Alignment, median, path_times, warp
from engine_proc.speech.segments import Stretch, compression_ratio, stretches
from engine_proc.speech.words import Word, fit, group, in_order, onset, timed

BEGIN = 1000


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (5, 40), (30, 30), (40, 7)])
def test_the_warp_takes_the_path_that_transformers_takes(shape: tuple[int, int]) -> None:
    cost = np.random.default_rng(shape[0]).standard_normal(shape)
    rows, columns = warp(cost)
    wanted_rows, wanted_columns = _dynamic_time_warping(cost)
    assert rows.tolist() == wanted_rows.tolist() and columns.tolist() == wanted_columns.tolist()


def test_the_median_is_that_of_transformers() -> None:
    import torch
    data = np.random.default_rng(0).standard_normal((2, 5, 50)).astype(np.float32)
    assert np.array_equal(median(data), _median_filter(torch.from_numpy(data)[None], 7)[0].numpy())
    assert median(data[..., :3]).tolist() == data[..., :3].tolist()


def test_a_token_begins_where_its_attention_begins() -> None:
    """Two prompt tokens and four of text, each listening to ten frames."""
    weights = np.full((3, 7, 50), 1e-4, np.float32)
    for token in range(5):                                     # rows 1.. choose the text tokens and the end
        weights[:, 1 + token, 10 * token:10 * token + 10] = 0.1
    starts = path_times(weights, 2, 4, 50.0).starts
    assert np.abs(starts - np.array([0.0, 0.2, 0.4, 0.6, 0.8])).max() <= 0.06


def decode(ids: list[int]) -> str:
    return bytes(ids).decode("utf-8", errors="replace")


def words_in(text: str, spaces: bool = True) -> list[str]:
    return [word for word, _, _ in group(list(text.encode()), decode, spaces)]


def test_words_begin_at_spaces_and_marks() -> None:
    assert words_in(" Hello, big world.") == [" Hello", ",", " big", " world", "."]
    assert words_in(" naïve") == [" naïve"]
    assert words_in("日本語", spaces=False) == ["日", "本", "語"]


def test_words_cover_every_token_once() -> None:
    data = list(" Où? “Là” – d’accord".encode())
    found = group(data, decode, True)
    assert [first for _, first, _ in found] == [0, *[last for _, _, last in found[:-1]]] and found[-1][2] == len(data)
    assert "".join(word for word, _, _ in found) == " Où? “Là” – d’accord"


def test_marks_belong_to_the_word_they_touch() -> None:
    data = list(b" Yes, (no).")
    words = timed(data, Alignment(np.arange(len(data) + 1) * 0.1), decode, True)
    assert [word.text for word in words] == [" Yes,", " (no)."]
    assert words[0].start_s == 0.0 and words[0].end_s == pytest.approx(0.4), "a mark has no time of its own"


def test_a_word_beside_a_pause_is_cut_to_a_plausible_length() -> None:
    words = [Word(" a", 0, 1, 0.0, 5.0), Word(" b", 1, 2, 5.0, 5.3)]
    start, end = fit(words, 4.5, 5.3, 0.0, 0.3)
    assert words[0].start_s == pytest.approx(4.4) and (start, end) == (pytest.approx(4.4), 5.3)


@pytest.mark.parametrize(("ids", "wanted"), [
    ([], []),
    ([1, 2, 3], [Stretch(0, 3, 0.0, 8.0)]),
    ([BEGIN, 1, 2, BEGIN + 100], [Stretch(0, 4, 0.0, 2.0)]),
    ([BEGIN, 1, BEGIN + 50, BEGIN + 75, 2, BEGIN + 150], [Stretch(0, 3, 0.0, 1.0), Stretch(3, 6, 1.5, 3.0)]),
    ([BEGIN + 10, 1, 2], [Stretch(0, 3, 0.2, 8.0)]),
    ([BEGIN, 1, BEGIN + 1500], [Stretch(0, 3, 0.0, 8.0)])])
def test_segments_lie_between_timestamps_and_end_with_the_sound(ids: list[int], wanted: list[Stretch]) -> None:
    found = stretches(ids, BEGIN, 8.0)
    assert [(s.first, s.last) for s in found] == [(s.first, s.last) for s in wanted]
    assert [(s.start_s, s.end_s) for s in found] == [pytest.approx((s.start_s, s.end_s)) for s in wanted]


def test_repetition_compresses_well() -> None:
    assert compression_ratio("so it goes " * 30) > 2.4 > compression_ratio("He was not an ill-disposed young man.")
    assert compression_ratio("") == 0.0


def test_sound_begins_where_the_spectrogram_rises() -> None:
    features = np.full((80, 3000), -0.9, np.float32)
    features[:, 31:900] = 0.6
    features[:, 12] = 0.6                                      # a click is no speech
    assert onset(features, 10.0) == pytest.approx(0.31)
    assert onset(np.zeros((80, 3000), np.float32), 10.0) == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_times_never_go_back_whatever_was_found(seed: int) -> None:
    times = np.random.default_rng(seed).uniform(-1, 12, (20, 2)).tolist()
    words = [Word("a", i, i + 1, start, end) for i, (start, end) in enumerate(times)]
    in_order(words, 0.5, 10.0)
    flat = [time for word in words for time in (word.start_s, word.end_s)]
    assert flat == sorted(flat) and flat[0] >= 0.5 and flat[-1] <= 10.0
    right = [Word("a", 0, 1, 1.0, 2.0), Word("b", 1, 2, 2.0, 2.5), Word("c", 2, 3, 4.0, 5.0)]
    in_order(right, 0.5, 10.0)
    assert [(w.start_s, w.end_s) for w in right] == [(1.0, 2.0), (2.0, 2.5), (4.0, 5.0)]
