"""Keeps constrained rows of logits to what their grammars allow: bits of the matchers over their rows.

Engine process, used by the runner. Free rows are not touched, and a step without constrained rows costs a look at its
items. What is masked is minus infinity before anything else is done with it, so that log-probabilities, penalties and
filters see what the grammar left.
"""
from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.kernels import reference
from engine_proc.request import Sequence

Mask = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]      # Kernels.mask


@dataclass(slots=True)
class Masks:
    """What is allowed in some rows of one step."""

    which: np.ndarray                   # int64 [n]: the rows, in order
    allowed: np.ndarray                 # int32 [n, words]: a bit for each id, lowest first

    def apply(self, logits: torch.Tensor, mask: Mask | None = None) -> None:
        """Mask rows of `logits`, float32 [R, V], in place. `mask`: a faster way of the model's."""
        which, allowed = (torch.from_numpy(array).to(logits.device) for array in (self.which, self.allowed))
        (mask or reference.mask)(logits, which, allowed)


def masks(seqs: Many[Sequence], vocab: int) -> Masks | None:
    """The masks of those rows whose grammars rule; `seqs` are the sequences of all rows. None without such rows.

    A grammar that fails here allows nothing; the failure ends its sequence when the step is collected.
    """
    ruled = [(row, seq, seq.constraint) for row, seq in enumerate(seqs) if seq.constraint is not None]
    ruled = [each for each in ruled if each[2].rules]
    if not ruled:
        return None
    allowed = np.empty((len(ruled), ruled[0][2].words), np.int32)
    for bits, (_, seq, rule) in zip(allowed, ruled):
        rule.allow(bits, vocab, rule.unwelcome(seq.sampling, seq.stops, seq.num_output))
    return Masks(np.array([row for row, _, _ in ruled], np.int64), allowed)


def without_ends(seqs: Many[Sequence], banned: list[tuple[int, np.ndarray]],
                 vocab: int) -> list[tuple[int, np.ndarray]]:
    """`banned`, (row, ids), as it is with grammars: one that rules bans ends itself, one that waits lets nothing end."""
    kept = [(row, ids) for row, ids in banned if seqs[row].constraint is None]
    for row, seq in enumerate(seqs):
        if seq.constraint is not None and not seq.constraint.rules:
            ids = [id_ for id_ in seq.constraint.unwelcome(seq.sampling, seq.stops, seq.num_output) if id_ < vocab]
            if ids:
                kept.append((row, np.array(ids, np.int64)))
    return kept
