"""Decode steps as captured graphs: for which numbers of rows there are some, what fills the rest, and what they read.

A graph computes a fixed number of rows from buffers that never move. A step of single tokens is copied into them, padded
up to the next size, and replayed; any other step is computed as it is. A padding row is token 0 at position 0 with the
reserved block 0, where it writes and reads what nobody else looks at. Engine process, behind the device seam.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch

from engine_proc.attention import AttentionBatch, PagedAttention
from engine_proc.decoder import ModelBatch


class Graph(Protocol):
    """Captured work. Its result lies in the same memory after every replay."""

    def replay(self) -> torch.Tensor: ...


class Model(Protocol):
    """What is captured: see runner.Model."""

    vocab_size: int
    hidden_size: int

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor: ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor: ...


def sizes(most: int) -> list[int]:
    """Numbers of rows up to `most`, ascending: powers of two with one step halfway between them from 16 on, so that
    padding adds half at most, and a third from 16 rows on."""
    found, size = [], 1
    while size < most:
        found.append(size)
        if size >= 16 and size + size // 2 < most:
            found.append(size + size // 2)
        size *= 2
    return [*found, most]


def pick(available: Sequence[int], rows: int) -> int | None:
    """The smallest size that holds `rows`; None when there is none."""
    return next((size for size in available if size >= rows), None)


def rows_of(batch: ModelBatch) -> int | None:
    """How many rows a step of nothing but single tokens has; None for any other step."""
    count = batch.attention.num_decodes
    single = count == len(batch.attention.host_context_len) == len(batch.ids)
    return count if single and batch.embeds is None else None


class Inputs:
    """The buffers that all graphs read, for up to `most` rows and sequences of up to `max_blocks` blocks."""

    def __init__(self, most: int, max_blocks: int, device: torch.device) -> None:
        self.ids, self.positions, self.slots = torch.zeros((3, most), dtype=torch.int64, device=device)
        self.context_len = torch.ones(most, dtype=torch.int32, device=device)
        self.tables = torch.zeros((most, max_blocks), dtype=torch.int32, device=device)
        self.query_start = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.rows = torch.arange(most, dtype=torch.int64, device=device)
        self.host_query_start = np.arange(most + 1, dtype=np.int32)
        self.host_context_len = np.ones(most, np.int32)

    def batch(self, size: int) -> ModelBatch:
        """The buffers as the batch of a graph of `size` rows, all of which are wanted."""
        return ModelBatch(
            ids=self.ids[:size], positions=self.positions[:size], rows=self.rows[:size],
            attention=AttentionBatch(
                query_start=self.query_start[:size + 1], context_len=self.context_len[:size],
                block_tables=self.tables[:size], slots=self.slots[:size], num_decodes=size,
                host_query_start=self.host_query_start[:size + 1], host_context_len=self.host_context_len[:size]))

    def fill(self, batch: ModelBatch, size: int) -> None:
        """Copy a step's rows, and make the rest up to `size` padding. In the order of the device's work."""
        attention, count = batch.attention, len(batch.ids)
        for buffer, given, padding in (
                (self.ids, batch.ids, 0), (self.positions, batch.positions, 0), (self.slots, attention.slots, 0),
                (self.context_len, attention.context_len, 1)):
            buffer[:count].copy_(given, non_blocking=True)
            buffer[count:size].fill_(padding)
        width = attention.block_tables.shape[1]
        self.tables[:count, :width].copy_(attention.block_tables, non_blocking=True)
        self.tables[:count, width:].fill_(0)
        self.tables[count:size].fill_(0)
        self.host_context_len[:count], self.host_context_len[count:size] = attention.host_context_len, 1


class GraphedModel:
    """Implements runner.Model: `model`, with decode steps of up to `most` rows captured by `capture`."""

    def __init__(self, model: Model, cache: PagedAttention, capture: Callable[[Callable[[], torch.Tensor]], Graph],
                 most: int, max_blocks: int, device: torch.device) -> None:
        self.vocab_size, self.hidden_size = model.vocab_size, model.hidden_size
        self._model, self._inputs, self._sizes = model, Inputs(most, max_blocks, device), sizes(most)
        # The largest first: the smaller ones find room in the memory that it took.
        self._graphs = {size: capture(partial(model.forward, self._inputs.batch(size), cache))
                        for size in reversed(self._sizes)}

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        count = rows_of(batch)
        size = None if count is None else pick(self._sizes, count)
        if size is None:
            return self._model.forward(batch, cache)
        self._inputs.fill(batch, size)
        return self._graphs[size].replay()[batch.rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)
