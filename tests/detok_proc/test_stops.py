"""Stop strings: exact matches, least hold-back, any grouping, linear work. The reference re-reads the whole text."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detok_proc.stops import Pattern, Stops

Outcome = tuple[list[str], str | None, int | None]


def reference(pieces: list[str], stops: list[str], include: bool, dead: int) -> Outcome:
    """(text visible after each piece, the stop string, the piece that completed it); `dead` pieces cannot end one."""
    text, visible = "", list[str]()
    for number, piece in enumerate(pieces):
        for char in piece:
            text += char
            ended = [stop for stop in stops if text.endswith(stop)] if number >= dead else []
            if ended:
                stop = max(ended, key=len)
                return [*visible, text if include else text[:-len(stop)]], stop, number
        held = max((size for stop in stops for size in range(len(stop)) if text.endswith(stop[:size])), default=0)
        visible.append(text if include else text[:len(text) - held])
    return visible, None, None


def run(pieces: list[str], stops: list[str], include: bool, dead: int) -> Outcome:
    scanner, text, visible = Stops(stops, include), "", []
    for number, piece in enumerate(pieces):
        text += scanner.push(piece, number >= dead)
        visible.append(text)
        if scanner.hit is not None:
            return visible, scanner.hit, number
    assert text + scanner.end() == "".join(pieces)
    return visible, None, None


letters = st.text("abc", max_size=5)


@settings(max_examples=600, deadline=None)
@given(st.lists(letters, max_size=12), st.lists(st.text("abc", min_size=1, max_size=6), min_size=1, max_size=4),
       st.booleans(), st.integers(0, 4))
def test_matches_and_hold_back_equal_a_search_of_the_whole_text(
        pieces: list[str], stops: list[str], include: bool, dead: int) -> None:
    assert run(pieces, stops, include, dead) == reference(pieces, stops, include, dead)


def test_a_stop_string_split_over_pieces_is_held_back_and_cut() -> None:
    stops = Stops(["\n\nUser:"], False)
    assert [stops.push(piece, True) for piece in ("Yes.", "\n", "\nUs", "er", ": no")] == ["Yes.", "", "", "", ""]
    assert stops.hit == "\n\nUser:"


def test_what_was_held_back_in_vain_is_released_at_once() -> None:
    stops = Stops(["abcd"], False)
    assert [stops.push(piece, True) for piece in ("xab", "c", "x")] == ["x", "", "abcx"]


def test_the_held_back_suffix_is_the_longest_that_can_still_match() -> None:
    stops = Stops(["aab"], False)
    assert [stops.push("a", True) for _ in range(4)] == ["", "", "a", "a"]
    assert stops.push("b", True) == "" and stops.hit == "aab"


def test_nothing_is_held_back_when_the_stop_string_is_kept() -> None:
    stops = Stops(["END"], True)
    assert [stops.push(piece, True) for piece in ("xE", "N", "D!")] == ["xE", "N", "D"]


def test_the_earliest_end_wins_and_then_the_longer_string() -> None:
    early = Stops(["abcdef", "cd"], False)
    assert early.push("abcdef", True) == "ab" and early.hit == "cd"
    longer = Stops(["b", "ab"], False)
    assert longer.push("xab", True) == "x" and longer.hit == "ab"


def test_a_match_that_does_not_count_yet_may_be_followed_by_an_overlapping_one() -> None:
    stops = Stops(["aa"], False)
    assert stops.push("aa", False) == "a" and stops.hit is None
    assert stops.push("a", True) == "" and stops.hit == "aa"


class CountingText(str):
    """Counts the characters that are compared."""

    reads = 0

    def __getitem__(self, key: Any) -> str:
        CountingText.reads += 1
        return super().__getitem__(key)


@pytest.mark.parametrize("text", ["a" * 1023 + "b", "ab" * 512])
def test_the_work_is_linear_in_the_text_even_for_the_worst_stop_string(text: str) -> None:
    pattern = Pattern(CountingText(text))
    CountingText.reads = 0
    for _ in range(20_000):
        pattern.scan("a", True)
    assert CountingText.reads <= 4 * 20_000 + 4 * len(text)


def test_a_stop_string_that_never_begins_costs_nothing_to_prepare() -> None:
    pattern = Pattern("x" * 1024)
    pattern.scan("no such letter" * 100, True)
    assert pattern.failure == [0]
