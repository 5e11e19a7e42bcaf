"""Which tokens a step may choose: suppressed ids, languages only, and the grammar of timestamps.

Engine process. The rules are those of the authors' implementation (Radford et al. 2022, as in transformers' logits
processors): timestamps come in pairs, never go back, start within the first second, and are taken whenever together they
are likelier than any single word. Works in place on rows of logits.
"""
from __future__ import annotations

from collections.abc import Sequence

import torch

from engine_proc.speech.request import Take
from engine_proc.speech.vocabulary import Vocabulary

NEVER = float("-inf")


class Rules:
    """The rules of one model, with its constant indices at hand."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._suppress = torch.tensor(vocabulary.suppress, dtype=torch.int64)
        self._begin = torch.tensor(vocabulary.begin_suppress, dtype=torch.int64)
        self._languages = torch.tensor(sorted(vocabulary.languages.values()), dtype=torch.int64)

    def apply(self, logits: torch.Tensor, takes: Sequence[Take]) -> None:
        """`logits`: float32 [R, vocab], row i of the sequence takes[i]."""
        plain = [i for i, take in enumerate(takes) if not take.detect]
        if len(plain) == len(takes) and len(self._suppress):
            logits.index_fill_(1, self._suppress, NEVER)
        for i, take in enumerate(takes):
            row = logits[i]
            if take.detect:
                allowed = row[self._languages]
                row.fill_(NEVER)
                row[self._languages] = allowed
                continue
            if len(plain) != len(takes):
                row.index_fill_(0, self._suppress, NEVER)
            if not take.num_output:
                row.index_fill_(0, self._begin, NEVER)
            if take.timestamps:
                self._timestamps(row, take)

    def _timestamps(self, row: torch.Tensor, take: Take) -> None:
        vocabulary, first = self._vocabulary, self._vocabulary.timestamp_begin
        row[vocabulary.no_timestamps] = NEVER
        output = take.tokens[take.num_prompt:]
        if not output:
            row[:first] = NEVER
            if vocabulary.max_initial_timestamp is not None:
                row[first + vocabulary.max_initial_timestamp + 1:] = NEVER
            return
        ended = output[-1] >= first
        paired = len(output) < 2 or output[-2] >= first
        if ended:
            if paired:
                row[first:] = NEVER                          # a word has to follow
            else:
                row[:vocabulary.eot] = NEVER                 # the next stretch begins, or all is said
        latest = next((token for token in reversed(output) if token >= first), None)
        if latest is not None:
            row[first:latest if ended and not paired else latest + 1] = NEVER
        if torch.logsumexp(row[first:], 0) > row[:first].max():
            row[:first] = NEVER
