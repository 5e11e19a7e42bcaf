"""Texts in sampling parameters to token ids: bad words, and the tags of a bounded reasoning.

Run by the tokenizer, for new requests and for continuations alike: the frontend keeps the texts only.
"""
from __future__ import annotations

import dataclasses
from array import array

from pipeline.errors import QuartetError
from pipeline.messages import pack_ids
from pipeline.params import MAX_BAD_WORDS, SamplingParams, Thinking
from tokenizer_proc.load import TextModel


def resolve(model: TextModel, sampling: SamplingParams) -> SamplingParams:
    """`sampling` with the ids of its texts; QuartetError where there are none."""
    if sampling.bad_words:
        sampling = dataclasses.replace(sampling, bad_ids=bad_ids(model, sampling.bad_words))
    if sampling.thinking is not None:
        sampling = dataclasses.replace(sampling, thinking=_tagged(model, sampling.thinking))
    return sampling


def bad_ids(model: TextModel, words: list[str]) -> list[bytes]:
    """The id sequences that write `words` at the beginning of a text and after a space."""
    found: dict[bytes, None] = {}
    for word in words:
        for text in (word, " " + word.lstrip(" ")):
            ids = _encode(model, text)
            if ids:
                found[pack_ids(ids)] = None
    if len(found) > MAX_BAD_WORDS:
        raise QuartetError("invalid_value", f"'bad_words' become {len(found)} sequences of token ids, with and without "
                           f"a space before them; at most {MAX_BAD_WORDS} are taken.", "bad_words")
    return list(found)


def _tagged(model: TextModel, thinking: Thinking) -> Thinking:
    start, end = (model.tokenizer.token_to_id(tag) for tag in (thinking.start, thinking.end))
    if start is None or end is None:
        raise QuartetError("unsupported_parameter", "The parameter 'thinking_token_budget' needs a model whose reasoning "
                           "tags are tokens of its own.", "thinking_token_budget")
    return dataclasses.replace(thinking, start_id=start, end_id=end)


def _encode(model: TextModel, text: str) -> array[int]:
    try:
        return model.encode([(text, True)], False, unlimited=True)
    except QuartetError as error:
        error.param = "bad_words"
        raise
