"""Groups tokens into words, gives each its time, and keeps times plausible. Engine process, numpy only.

Words begin at a space (in languages without spaces: every character is one), punctuation belongs to the word that it
touches. Attention spreads over pauses, so that a word beside one can come out far too long: those are cut to about
twice the usual length, on the side of the pause.
"""
from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from engine_proc.speech.align import Alignment

OPENING = frozenset("\"'“¿([{-")
CLOSING = frozenset("\"'.。,，!！?？:：”)]}、")
SENTENCE_ENDS = frozenset(".。!！?？")
USUAL_MOST_S = 0.7               # no language's usual word is longer


@dataclass(slots=True)
class Word:
    """`first`..`last`: positions among the window's text ids, the last one excluded. Times within the window."""

    text: str
    first: int
    last: int
    start_s: float
    end_s: float


def group(ids: Sequence[int], decode: Callable[[Sequence[int]], str], spaces: bool) -> list[tuple[str, int, int]]:
    """(text, first, last) of the words in `ids`."""
    pieces = []
    whole, first, offset = decode(ids), 0, 0
    for last in range(1, len(ids) + 1):
        text = decode(ids[first:last])
        broken = text.find("\ufffd")
        if broken < 0 or whole[offset + broken:offset + broken + 1] == "\ufffd" or last == len(ids):
            pieces.append((text, first, last))
            offset += len(text)
            first = last
    if not spaces:
        return pieces
    words: list[tuple[str, int, int]] = []
    for text, first, last in pieces:
        blank = words and not words[-1][0].strip()             # a space that is a token of its own
        if not blank and (not words or text.startswith(" ") or text.strip() in string.punctuation):
            words.append((text, first, last))
        else:
            words[-1] = (words[-1][0] + text, words[-1][1], last)
    return words


def timed(ids: Sequence[int], alignment: Alignment, decode: Callable[[Sequence[int]], str], spaces: bool) -> list[Word]:
    """The words of a window with their times."""
    starts = alignment.starts
    words = [Word(text, first, last, float(starts[first]), float(starts[last]))
             for text, first, last in group(ids, decode, spaces)]
    _cut_at_sentences(words, usual(words))
    return _with_punctuation(words)


def usual(words: Sequence[Word]) -> float:
    """The median length of the words that have one, in seconds."""
    lengths = [word.end_s - word.start_s for word in words if word.end_s > word.start_s]
    return min(USUAL_MOST_S, float(np.median(lengths))) if lengths else 0.0


def _cut_at_sentences(words: list[Word], length: float) -> None:
    for before, word in zip(words, words[1:]):
        if word.end_s - word.start_s > 2 * length:
            if word.text.strip() in SENTENCE_ENDS:
                word.end_s = word.start_s + 2 * length
            elif before.text.strip() in SENTENCE_ENDS:
                word.start_s = word.end_s - 2 * length


def _with_punctuation(words: list[Word]) -> list[Word]:
    """Marks joined to the word behind them (opening ones) or in front of them (closing ones)."""
    joined: list[Word] = []
    for word in reversed(words):
        if joined and word.text.startswith(" ") and word.text.strip() in OPENING:
            after = joined[-1]
            after.text, after.first = word.text + after.text, word.first
        else:
            joined.append(word)
    result: list[Word] = []
    for word in reversed(joined):
        if result and not result[-1].text.endswith(" ") and word.text in CLOSING:
            result[-1].text += word.text
            result[-1].last = word.last
        else:
            result.append(word)
    return [word for word in result if word.text.strip()]


def fit(words: list[Word], start_s: float, end_s: float, quiet_since_s: float, length: float) -> tuple[float, float]:
    """Bring the words of a segment and its own times in line; the segment's times, both within the window.

    `quiet_since_s`: end of the speech before; `length`: that of a usual word. A first word after a pause, and a last
    word that outlasts its segment by far, are cut; else the segment takes the times of its words.
    """
    first, last, longest = words[0], words[-1], 2 * length
    second = words[1] if len(words) > 1 else None
    if first.end_s - quiet_since_s > 2 * longest and (
            first.end_s - first.start_s > longest or (second and second.end_s - first.start_s > 2 * longest)):
        if second and second.end_s - second.start_s > longest:
            first.end_s = second.start_s = max(second.end_s / 2, second.end_s - longest)
        first.start_s = max(0.0, first.end_s - longest)
    if first.start_s < start_s - 0.5 and start_s < first.end_s:
        first.start_s = max(0.0, min(first.end_s - length, start_s))
    else:
        start_s = first.start_s
    if last.end_s > end_s + 0.5 and end_s > last.start_s:
        last.end_s = max(last.start_s + length, end_s)
    else:
        end_s = last.end_s
    return start_s, end_s


def in_order(words: list[Word], since_s: float, seconds: float) -> None:
    """No word begins before the one ahead of it has ended, none before `since_s` and none ends behind `seconds`."""
    for word in words:
        word.start_s = min(max(word.start_s, since_s), seconds)
        word.end_s = since_s = min(max(word.end_s, word.start_s), seconds)


def onset(features: np.ndarray, seconds: float, window_s: float = 30.0) -> float:
    """Where sound begins in a window, in seconds: `features` is its log-mel spectrogram, [mels, frames].

    The first of three frames in a row that rise clearly from the window's quiet towards its loud parts.
    """
    frames = features.shape[1]
    loud = features[:, :max(3, min(frames, round(seconds / window_s * frames)))].mean(axis=0)
    quiet, speech = np.quantile(loud, (0.05, 0.95))
    above = loud > quiet + 0.25 * (speech - quiet)
    begun = np.flatnonzero(above[:-2] & above[1:-1] & above[2:])
    return float(begun[0]) * window_s / frames if len(begun) else 0.0
