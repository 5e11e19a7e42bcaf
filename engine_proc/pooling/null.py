"""The null pooling runner: deterministic numbers from ids instead of a model, for tests of others. No torch.

An embedding is the mean of one fixed vector per id, so that texts that share words are similar. A pair's score grows
with the share of its second text's ids that the first text has. `null_script` holds options, separated by semicolons:

    dimension=N     of embeddings (32); they may be cut to any size
    labels=N        of classifiers (2)
    nan_id=N        an input that holds this id gives no valid numbers
    raise_id=N      a batch that holds this id fails as a whole
    hang_id=N       a batch that holds this id never ends
"""
from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine_proc.pooling.plan import (
    CLASSIFY,
    EMBED,
    SCORE,
    TOKEN_CLASSIFY,
    TOKEN_EMBED,
    TOKEN_TASKS,
    PoolBatch,
    PoolResult,
)
from engine_proc.pooling.request import PoolItem
from pipeline.config import ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.params import PoolParams

DEFAULT_VOCAB = 32_000
TASKS = {"embed": (EMBED, TOKEN_EMBED), "classify": (CLASSIFY, TOKEN_CLASSIFY), "score": (SCORE, CLASSIFY)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """A parsed `null_script`."""

    dimension: int = 32
    labels: int = 2
    nan_id: int = -1
    raise_id: int = -1
    hang_id: int = -1

    @classmethod
    def parse(cls, text: str) -> Script:
        numbers = dict[str, int]()
        for part in filter(None, (p.strip() for p in text.split(";"))):
            name, _, value = part.partition("=")
            if name not in cls.__slots__ or not value.isdigit():
                raise StartError(CONFIG, f"The null pooling engine's script does not know '{part}'.")
            numbers[name] = int(value)
        return cls(**numbers)


class NullPoolRunner:
    """Implements `plan.PoolRunner`. A batch takes `null_step_s` at least, asleep."""

    def __init__(self, model: ModelConfig, depth: int = 0) -> None:
        script = Script.parse(model.engine.null_script)
        self.depth, self.padded = depth, False
        self.vocab_size = model.vocab_size or DEFAULT_VOCAB
        self.num_type_ids, self.max_positions = 2, 0
        self.tasks: tuple[str, ...] = TASKS[model.task]
        self.dimension = script.dimension if model.task == "embed" else 0
        self.num_labels = {"embed": 0, "classify": script.labels, "score": 1}[model.task]
        self.matryoshka: tuple[int, ...] | None = () if model.task == "embed" else None
        self.facts: dict[str, Any] = {"dtype": "none", "device": "null", "architecture": "null",
                                      "labels": [f"LABEL_{i}" for i in range(self.num_labels)]}
        self._script, self._step_s = script, model.engine.null_step_s

    def launch(self, batch: PoolBatch) -> object:
        end = time.monotonic() + self._step_s
        return end, [self._item(item) for item in batch.items]

    def collect(self, handle: object) -> list[PoolResult]:
        assert isinstance(handle, tuple)
        end, results = handle
        if self._step_s:
            time.sleep(max(0.0, end - time.monotonic()))
        assert isinstance(results, list)
        return results

    def finish(self, rows: np.ndarray, params: PoolParams) -> np.ndarray:
        rows = rows[:, :params.dimensions or None]
        return rows if params.activation is False else rows / np.linalg.norm(rows, axis=-1, keepdims=True)

    def _item(self, item: PoolItem) -> PoolResult:
        ids, params, script = np.frombuffer(item.ids, "<u4"), item.params, self._script
        while script.hang_id in ids:
            time.sleep(1.0)
        if script.raise_id in ids:
            raise RuntimeError("the null pooling engine was told to fail")
        if params.task == SCORE:
            rows = _score(ids, np.frombuffer(item.type_ids, np.uint8), params.activation is not False)
        elif params.task in (CLASSIFY, TOKEN_CLASSIFY):
            rows = _vectors(ids, self.num_labels, params.task in TOKEN_TASKS)
            if params.activation is not False:
                rows = np.exp(rows) / np.exp(rows).sum(-1, keepdims=True)
        else:
            rows = self.finish(_vectors(ids[item.skip:], self.dimension, params.task in TOKEN_TASKS), params)
        if script.nan_id in ids:
            rows = np.full_like(rows, np.nan)
        return PoolResult(rows=np.ascontiguousarray(rows, np.float32))


def _vectors(ids: np.ndarray, width: int, each: bool) -> np.ndarray:
    """float32 [T or 1, width]: a fixed vector of each id, or their mean."""
    phase = (ids[:, None].astype(np.float64) + 1) * (np.arange(width) + 1) * 0.7390851
    vectors = np.sin(phase * 12.9898) * 2
    return np.asarray(vectors if each else vectors.mean(0, keepdims=True), np.float32)


def _score(ids: np.ndarray, type_ids: np.ndarray, activate: bool) -> np.ndarray:
    """[1, 1]: how many of the second text's ids the first has (without types: of all ids, how many come twice)."""
    if len(type_ids):
        first, second = ids[type_ids == 0], ids[type_ids == 1]
        share = float(np.isin(second, first).mean()) if len(second) else 0.0
    else:
        share = 1.0 - len(np.unique(ids)) / len(ids)
    logit = 8.0 * share - 4.0
    return np.array([[1.0 / (1.0 + np.exp(-logit)) if activate else logit]], np.float32)
