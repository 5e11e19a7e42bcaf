"""Keeps constrained rows of logits to what their grammars allow: bits of the matchers over their rows.

Engine process, used by the runner. Free rows are not touched, and a step without constrained rows costs a look at its
items. What is masked is minus infinity before anything else is done with it, so that log-probabilities, penalties and
filters see what the grammar left.
"""
from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.request import Sequence


@dataclass(slots=True)
class Masks:
    """What is forbidden in some rows of one step."""

    which: np.ndarray                   # int64 [n]: the rows, in order
    forbidden: np.ndarray               # bool [n, V]

    def apply(self, logits: torch.Tensor) -> None:
        """Mask rows of `logits`, float32 [R, V], in place."""
        if logits.device.type == "cpu":                 # in place row by row: copies of rows cost more than the masks
            rows = logits.numpy()
            for row, forbidden in zip(self.which.tolist(), self.forbidden):
                np.copyto(rows[row], np.float32(-np.inf), where=forbidden)
            return
        index = torch.from_numpy(self.which).to(logits.device)
        logits[index] = logits[index].masked_fill_(torch.from_numpy(self.forbidden).to(logits.device), float("-inf"))


def masks(seqs: Many[Sequence], vocab: int) -> Masks | None:
    """The masks of those rows whose grammars rule; `seqs` are the sequences of all rows. None without such rows.

    A grammar that fails here allows nothing; the failure ends its sequence when the step is collected.
    """
    which, allowed = [], []
    for row, seq in enumerate(seqs):
        rule = seq.constraint
        if rule is not None and rule.rules:
            which.append(row)
            allowed.append(rule.allowed(vocab, rule.unwelcome(seq.sampling, seq.stops, seq.num_output, vocab)))
    return Masks(np.array(which, np.int64), ~np.stack(allowed)) if which else None


def without_ends(seqs: Many[Sequence], banned: list[tuple[int, np.ndarray]],
                 vocab: int) -> list[tuple[int, np.ndarray]]:
    """`banned`, (row, ids), as it is with grammars: one that rules bans ends itself, one that waits lets nothing end."""
    kept = [(row, ids) for row, ids in banned if seqs[row].constraint is None]
    for row, seq in enumerate(seqs):
        if seq.constraint is not None and not seq.constraint.rules:
            ids = seq.constraint.unwelcome(seq.sampling, seq.stops, seq.num_output, vocab)
            if len(ids):
                kept.append((row, ids))
    return kept
