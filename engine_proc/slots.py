"""Sampling parameters and penalty counts of the running sequences, as arrays with one row per slot.

The runner fills a row on admission (replaying the sequence's tokens) and frees it on release; the sampler gathers rows
by index. Counts over the vocabulary exist only for sequences that ask for penalties. Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from engine_proc.request import Sequence
from pipeline.errors import invalid
from pipeline.messages import unpack_ids

OFF = -1


@dataclass(slots=True)
class Rows:
    """The parameters of R rows of logits, gathered for one step. NumPy arrays [R] unless said otherwise."""

    temperature: np.ndarray             # float32; 0: greedy
    top_k: np.ndarray                   # int64; 0: off
    top_p: np.ndarray                   # float64
    min_p: np.ndarray                   # float32
    seed: np.ndarray                    # uint64
    choice: np.ndarray                  # uint64
    logprobs: np.ndarray                # int64; OFF: none are wanted
    position: np.ndarray                # int64: index of the row's next token among the output
    penalty: np.ndarray                 # int64: row of the count tables; OFF: no penalties
    presence: np.ndarray                # float32
    frequency: np.ndarray               # float32
    repetition: np.ndarray              # float32
    bias: list[tuple[int, np.ndarray, np.ndarray]] = field(default_factory=list)    # (row, ids, values)
    banned: list[tuple[int, np.ndarray]] = field(default_factory=list)              # (row, ids): min_tokens


class Slots:
    """One row per running sequence. `vocab` is the width of the logits, `longest` the most tokens of a sequence."""

    def __init__(self, count: int, vocab: int, longest: int, device: torch.device) -> None:
        self.vocab, self.longest, self.device = vocab, longest, device
        self._free = list(range(count - 1, -1, -1))
        self._bias: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._ends: dict[int, np.ndarray] = {}          # slot -> ids that end it; only where min_tokens is set
        self._floats = np.zeros((5, count), np.float32)     # temperature, min_p, presence, frequency, repetition
        self._top_p = np.ones(count, np.float64)
        self._ints = np.zeros((3, count), np.int64)         # top_k, logprobs, penalty
        self._keys = np.zeros((2, count), np.uint64)        # seed, choice
        self._min_tokens = np.zeros(count, np.int64)
        self._free_counts: list[int] = []
        self._num_seen = np.zeros(0, np.int64)          # [P]
        self._seen = torch.zeros((0, longest), dtype=torch.int64, device=device)      # [P, longest]: the tokens so far
        self.counts = torch.zeros((0, vocab), dtype=torch.int32, device=device)       # [P, V]: among the output

    def admit(self, seq: Sequence) -> None:
        """Give `seq` a slot. QuartetError for ids outside of the vocabulary, before anything is taken."""
        params = seq.sampling
        bias_ids = np.frombuffer(params.bias_ids, np.uint32).astype(np.int64)
        if len(bias_ids) and int(bias_ids.max()) >= self.vocab:
            raise invalid(f"Token id {int(bias_ids.max())} is outside of the vocabulary.", "logit_bias")
        if len(seq.tokens) and max(seq.tokens) >= self.vocab:
            raise invalid(f"Token id {max(seq.tokens)} is outside of the vocabulary.", "prompt")
        if not self._free:
            self._grow()
        slot = seq.slot = self._free.pop()
        self._floats[:, slot] = (
            0.0 if params.greedy else params.temperature, params.min_p, params.presence_penalty,
            params.frequency_penalty, params.repetition_penalty)
        self._top_p[slot] = params.top_p
        self._ints[:, slot] = (max(params.top_k, 0), OFF if params.logprobs is None else params.logprobs,
                               self._take_counts(seq) if params.penalised else OFF)
        self._keys[:, slot] = params.seed, seq.choice
        self._min_tokens[slot] = params.min_tokens
        if len(bias_ids):
            self._bias[slot] = bias_ids, np.frombuffer(params.bias_values, np.float32)
        ends = [id_ for id_ in seq.stops | set(unpack_ids(params.stop_ids)) if id_ < self.vocab]
        if params.min_tokens and ends:
            self._ends[slot] = np.array(ends, np.int64)

    def release(self, seq: Sequence) -> None:
        """Take the slot back; idempotent."""
        slot, seq.slot = seq.slot, -1
        if slot < 0:
            return
        if self._ints[2, slot] != OFF:
            self._free_counts.append(int(self._ints[2, slot]))
        self._bias.pop(slot, None)
        self._ends.pop(slot, None)
        self._free.append(slot)

    def gather(self, slots: np.ndarray, position: np.ndarray) -> Rows:
        """The parameters of rows whose sequences sit in `slots`, int64 [R]."""
        floats, ints, keys = self._floats[:, slots], self._ints[:, slots], self._keys[:, slots]
        rows = Rows(
            temperature=floats[0], min_p=floats[1], presence=floats[2], frequency=floats[3], repetition=floats[4],
            top_p=self._top_p[slots], top_k=ints[0], logprobs=ints[1], penalty=ints[2], seed=keys[0], choice=keys[1],
            position=position)
        if self._bias:
            rows.bias = [(row, *self._bias[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._bias]
        if self._ends:
            held = np.flatnonzero(position < self._min_tokens[slots]).tolist()
            rows.banned = [(row, self._ends[slot]) for row in held if (slot := int(slots[row])) in self._ends]
        return rows

    def count(self, rows: Rows, tokens: torch.Tensor) -> None:
        """Add the sampled tokens, int64 [R], to the counts of the rows that keep some."""
        if not len(self.counts):
            return
        which = np.flatnonzero(rows.penalty >= 0)
        if len(which):
            tables = rows.penalty[which]
            index = torch.from_numpy(tables).to(self.device)
            some = tokens[torch.from_numpy(which).to(self.device)]
            self.counts[index, some] += 1
            self._seen[index, torch.from_numpy(self._num_seen[tables]).to(self.device)] = some
            self._num_seen[tables] += 1

    def seen_tokens(self, tables: np.ndarray) -> torch.Tensor:
        """The tokens of prompt and output of the sequences that count in `tables`: int64 [p, L].

        Shorter rows are filled with their own last token.
        """
        lengths = self._num_seen[tables]
        columns = np.minimum(np.arange(int(lengths.max())), lengths[:, None] - 1)
        return self._seen[torch.from_numpy(tables[:, None]).to(self.device), torch.from_numpy(columns).to(self.device)]

    def _take_counts(self, seq: Sequence) -> int:
        if not self._free_counts:
            old, more = len(self.counts), max(4, len(self.counts))
            self.counts = torch.cat([self.counts, self.counts.new_zeros(more, self.vocab)])
            self._seen = torch.cat([self._seen, self._seen.new_zeros(more, self.longest)])
            self._num_seen = np.concatenate([self._num_seen, np.zeros(more, np.int64)])
            self._free_counts = list(range(old + more - 1, old - 1, -1))
        row = self._free_counts.pop()
        tokens = torch.tensor(seq.tokens, dtype=torch.int64, device=self.device)
        self._seen[row, :len(tokens)] = tokens
        self._num_seen[row] = len(tokens)
        self.counts[row] = torch.bincount(tokens[seq.num_prompt:], minlength=self.vocab)
        return row

    def _grow(self) -> None:
        """Twice the slots; happens when more sequences are admitted than the configuration runs at once."""
        old = len(self._top_p)
        self._floats, self._ints, self._keys = (
            np.concatenate([table, np.zeros_like(table)], axis=1) for table in (self._floats, self._ints, self._keys))
        self._top_p, self._min_tokens = (
            np.concatenate([table, np.zeros_like(table)]) for table in (self._top_p, self._min_tokens))
        self._free = list(range(2 * old - 1, old - 1, -1))

    def assert_invariants(self, running: list[Sequence]) -> None:
        """`running`: every sequence that was admitted and not released."""
        held = [seq.slot for seq in running]
        assert len(set(held)) == len(held) and not set(held) & set(self._free)
        assert len(held) + len(self._free) == len(self._top_p)
        assert set(self._bias) <= set(held) and set(self._ends) <= set(held)
        counting = sum(seq.sampling.penalised for seq in running)
        assert counting + len(self._free_counts) == len(self.counts)
