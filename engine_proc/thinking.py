"""Bounds on reasoning: after so many ids inside of the thinking tags the end tag is what is sampled.

State per sequence that asked, on the model's device: how many ids it has thought, or that it does not think. `replay`
gives the same state from the tokens alone, so that a sequence may be admitted at any point of its output. Engine
process.
"""
from __future__ import annotations

from array import array

import numpy as np
import torch

from engine_proc.request import Sequence
from pipeline.params import Thinking

IDLE = -1                       # the count of a sequence that does not think


def replay(tokens: array[int], num_prompt: int, thinking: Thinking) -> int:
    """Ids thought so far, or IDLE, after `tokens`.

    A prompt that ends inside of the tags (the template opened them) starts the count; its own ids do not count.
    """
    thought = 0 if _open(tokens[:num_prompt], thinking) else IDLE
    for token in tokens[num_prompt:]:
        if thought == IDLE:
            thought = 0 if token == thinking.start_id else IDLE
        else:
            thought = IDLE if token == thinking.end_id else thought + 1
    return thought


def _open(prompt: array[int], thinking: Thinking) -> bool:
    """Whether an output begins inside of the tags."""
    for token in reversed(prompt):
        if token in (thinking.start_id, thinking.end_id):
            return token == thinking.start_id
    return thinking.implied


class Budgets:
    """The state of every sequence with a budget, one column each."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.free = device, list[int]()
        self._state = torch.zeros((4, 0), dtype=torch.int64, device=device)     # budget, start id, end id, thought

    def __len__(self) -> int:
        return self._state.shape[1]

    def take(self, seq: Sequence) -> int:
        thinking = seq.sampling.thinking
        assert thinking is not None
        if not self.free:
            old, more = len(self), max(4, len(self))
            self._state = torch.cat([self._state, self._state.new_zeros(4, more)], dim=1)
            self.free = list(range(old + more - 1, old - 1, -1))
        column = self.free.pop()
        self._state[:, column] = torch.tensor([thinking.budget, thinking.start_id, thinking.end_id,
                                               replay(seq.tokens, seq.num_prompt, thinking)])
        return column

    def apply(self, tokens: torch.Tensor, which: np.ndarray, columns: np.ndarray) -> torch.Tensor:
        """`tokens`, int64 [R], with the end tag where the budget of one of the rows `which` is used up; counts them."""
        index, column = (torch.from_numpy(array).to(self.device) for array in (which, columns))
        budget, start, end, thought = self._state[:, column]
        idle, drawn = thought == IDLE, tokens[index]
        drawn = torch.where(~idle & (thought >= budget), end, drawn)
        self._state[3, column] = torch.where(
            idle, torch.where(drawn == start, 0, IDLE), torch.where(drawn == end, IDLE, thought + 1))
        out = tokens.clone()
        out[index] = drawn
        return out
