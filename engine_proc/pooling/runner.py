"""Runs batches of inputs through a body and a head on this host. Implements `plan.PoolRunner`.

Engine process. A batch is computed where it is launched; results are cut per input and copied, so that nothing keeps a
whole batch alive.
"""
from __future__ import annotations

from typing import Any

import numpy as np
import torch

from engine_proc.pooling.body import Body, Packed
from engine_proc.pooling.heads import Head, finish
from engine_proc.pooling.plan import TOKEN_TASKS, PoolBatch, PoolResult
from engine_proc.pooling.request import PoolItem
from pipeline.params import PoolParams


class ModelPoolRunner:
    """One body with one head."""

    depth = 0

    def __init__(self, body: Body, head: Head, matryoshka: tuple[int, ...] | None, facts: dict[str, Any]) -> None:
        self._body, self._head, self.facts = body, head, facts
        self.padded, self.vocab_size, self.num_type_ids = body.padded, body.vocab_size, body.num_type_ids
        self.max_positions = body.max_positions
        self.tasks, self.dimension, self.num_labels = head.tasks, head.dimension, head.num_labels
        self.matryoshka = matryoshka if head.dimension else None

    def launch(self, batch: PoolBatch) -> object:
        return self._run(batch.items)

    def collect(self, handle: object) -> list[PoolResult]:
        assert isinstance(handle, list)
        return handle

    @torch.inference_mode()
    def finish(self, rows: np.ndarray, params: PoolParams) -> np.ndarray:
        made: np.ndarray = finish(torch.from_numpy(rows), params, self._head.activation).numpy()
        return made

    @torch.inference_mode()
    def _run(self, items: list[PoolItem]) -> list[PoolResult]:
        packed = Packed.of(items)
        hidden = self._body.forward(packed)
        groups: dict[tuple[str, bool | None, int], list[int]] = {}
        for number, item in enumerate(items):
            params = item.params
            groups.setdefault((params.task, params.activation, params.dimensions), []).append(number)
        raw = {task: self._head.rows(task, hidden, packed) for task in {task for task, _, _ in groups}}
        results: list[PoolResult] = [PoolResult() for _ in items]
        for (task, _, _), members in groups.items():
            bounds = packed.starts if task in TOKEN_TASKS else np.arange(len(items) + 1)
            rows = raw[task]
            if len(groups) > 1:
                rows = torch.cat([rows[bounds[n]:bounds[n + 1]] for n in members])
            data, at = finish(rows, items[members[0]].params, self._head.activation).numpy(), 0
            for number in members:
                count = int(bounds[number + 1] - bounds[number])
                results[number].rows = data[at:at + count].astype(np.float32)
                at += count
        return results
