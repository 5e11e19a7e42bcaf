"""From the ids of an accepted attempt to timed segments of text. Engine process, no torch.

With timestamps a segment is what stands between two of them; an end that the model left out is the end of the window's
sound. Without, a window is one segment.
"""
from __future__ import annotations

import math
import zlib
from dataclasses import dataclass

from engine_proc.speech import words as wording
from engine_proc.speech.align import Alignment
from engine_proc.speech.request import Take, Window
from engine_proc.speech.vocabulary import SECONDS_PER_TIMESTAMP, SPACELESS, Vocabulary
from pipeline.messages import SpeechSegment, SpeechWord, pack_ids


@dataclass(slots=True)
class Stretch:
    """Ids `first`..`last` (excluded) of the output, timestamps included, and their times within the window."""

    first: int
    last: int
    start_s: float
    end_s: float


def compression_ratio(text: str) -> float:
    """How well a text compresses: repetition shows as a high value."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def stretches(ids: list[int], begin: int, seconds: float) -> list[Stretch]:
    """Where the segments of `ids` lie; `begin` is the id of <|0.00|>, or -1."""
    if begin < 0 or not any(token >= begin for token in ids):
        return [Stretch(0, len(ids), 0.0, seconds)] if ids else []
    found: list[Stretch] = []
    first, start_s, text = 0, 0.0, False
    for position, token in enumerate(ids):
        if token < begin:
            text = True
            continue
        time_s = min((token - begin) * SECONDS_PER_TIMESTAMP, seconds)
        if text:
            found.append(Stretch(first, position + 1, start_s, max(time_s, start_s)))
            first, text = position + 1, False
        else:
            first = position
        start_s = time_s
    if text:
        found.append(Stretch(first, len(ids), start_s, max(seconds, start_s)))
    return found


def segments(window: Window, take: Take, vocabulary: Vocabulary, alignment: Alignment | None) -> list[SpeechSegment]:
    """The segments of a window, times from the beginning of the recording."""
    assert window.given is not None
    ids, origin, begin = take.output, window.given.start_s, vocabulary.timestamp_begin if take.timestamps else -1
    text_at = [i for i, token in enumerate(ids) if token < vocabulary.first_special]
    timed: list[wording.Word] = []
    if alignment is not None:
        spaces = window.request.language not in SPACELESS
        timed = wording.timed([ids[i] for i in text_at], alignment, vocabulary.text, spaces)
        if timed and timed[0].start_s < window.onset_s < timed[0].end_s:
            timed[0].start_s = window.onset_s
    length, quiet_since_s, seconds = wording.usual(timed), 0.0, window.given.seconds
    found = []
    for stretch in stretches(ids, begin, seconds):
        part = ids[stretch.first:stretch.last]
        text = vocabulary.text(part)
        if not text.strip():
            continue
        inside = [word for word in timed if stretch.first <= text_at[word.first] < stretch.last]
        if inside:
            stretch.start_s, stretch.end_s = wording.fit(inside, stretch.start_s, stretch.end_s, quiet_since_s, length)
            wording.in_order(inside, quiet_since_s, seconds)
        stretch.start_s = min(max(stretch.start_s, quiet_since_s), seconds)
        quiet_since_s = stretch.end_s = min(max(stretch.end_s, stretch.start_s), seconds)
        found.append(SpeechSegment(
            start_s=origin + stretch.start_s, end_s=origin + stretch.end_s,
            text=vocabulary.lead + text,
            ids=pack_ids(part), temperature=take.sampling.temperature, avg_logprob=take.avg_logprob,
            compression_ratio=compression_ratio(text), no_speech_prob=max(0.0, window.no_speech),
            words=[_word(word, take, text_at, origin) for word in inside]))
    return found


def _word(word: wording.Word, take: Take, text_at: list[int], origin: float) -> SpeechWord:
    logprobs = [take.logprobs[text_at[i]] for i in range(word.first, word.last)]
    return SpeechWord(origin + word.start_s, origin + word.end_s, word.text,
                      math.exp(sum(logprobs) / len(logprobs)) if logprobs else 0.0)
