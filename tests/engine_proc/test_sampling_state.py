"""What sampling keeps of a sequence's past is the same whether it was followed or replayed."""
from __future__ import annotations

from array import array
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine_proc import outputs
from engine_proc.bans import Words, ban_words
from engine_proc.history import Histories
from engine_proc.outputs import Outputs
from engine_proc.repetition import RepetitionWatch
from engine_proc.thinking import IDLE, Budgets, replay
from pipeline.messages import Logprobs, StepOut
from pipeline.params import Repetition, Thinking
from pipeline.transport import Address
from tests.engine_proc.tiny import sequence

CPU = torch.device("cpu")


def repeats(output: list[int], rule: Repetition) -> bool:
    """The direct computation: the end of `output` is some pattern, min_count times."""
    return any(output[-size * rule.min_count:] == output[-size:] * rule.min_count
               for size in range(rule.min_size, rule.max_size + 1) if size * rule.min_count <= len(output))


@settings(max_examples=200)
@given(output=st.lists(st.integers(0, 2), max_size=24), low=st.integers(1, 3), more=st.integers(0, 4),
       count=st.integers(2, 4))
def test_repetition_watch_sees_what_a_direct_search_sees(output: list[int], low: int, more: int, count: int) -> None:
    rule = Repetition(low + more, low, count)
    watch = RepetitionWatch(rule)
    for length, token in enumerate(output, 1):
        assert watch.push(token) == repeats(output[:length], rule)


@settings(max_examples=100)
@given(prompt=st.lists(st.integers(0, 5), min_size=1, max_size=6), drawn=st.lists(st.integers(0, 5), max_size=20),
       budget=st.integers(0, 4), implied=st.booleans())
def test_thinking_budgets_followed_and_replayed(prompt: list[int], drawn: list[int], budget: int, implied: bool) -> None:
    """Ids 1 and 2 are the tags. However far the sequence is when it is admitted, the same ids come."""
    thinking = Thinking(budget, "<", ">", implied, 1, 2)
    budgets, tokens, slot = Budgets(CPU), list(prompt), np.array([0])
    column = np.array([budgets.take(sequence(1, prompt, thinking=thinking))])
    for token in drawn:
        here = replay(array("I", tokens), len(prompt), thinking)
        fresh = Budgets(CPU)
        again = np.array([fresh.take(sequence(1, prompt, history=tokens[len(prompt):], thinking=thinking))])
        (chosen,) = budgets.apply(torch.tensor([token]), slot, column).tolist()
        assert fresh.apply(torch.tensor([token]), slot, again).tolist() == [chosen]
        assert chosen == (2 if here != IDLE and here >= budget else token)
        tokens.append(chosen)


@settings(max_examples=100)
@given(prompt=st.lists(st.integers(0, 3), min_size=1, max_size=4), output=st.lists(st.integers(0, 3), max_size=6),
       words=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=4), min_size=1, max_size=4))
def test_bad_words_are_those_whose_beginning_ends_the_output(prompt: list[int], output: list[int],
                                                             words: list[list[int]]) -> None:
    histories, logits = Histories(20, CPU), torch.zeros(2, 4)
    row = histories.take(sequence(1, prompt, history=output[:2]))
    for token in output[2:]:
        histories.push(np.array([row]), torch.tensor([token]))
    made = Words.of([np.array(word) for word in words])
    assert made is not None
    ban_words(logits, [(1, row, made)], histories)
    banned = {word[-1] for word in words if output[-len(word) + 1:] == word[:-1] and len(output) >= len(word) - 1}
    assert set(torch.isinf(logits[1]).nonzero()[:, 0].tolist()) == banned and not logits[0].any()


def test_histories_hold_prompt_and_output() -> None:
    histories = Histories(8, CPU)
    rows = np.array([histories.take(sequence(i, prompt)) for i, prompt in enumerate(([5, 6], [7]))])
    histories.push(rows, torch.tensor([8, 9]))
    assert histories.whole(rows).tolist() == [[5, 6, 8], [7, 9, 9]]
    assert histories.recent(rows, 2).tolist() == [[-1, 8], [-1, 9]]


def test_many_logprobs_travel_in_several_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step's output for one detokenizer, when it would be larger than a message may be."""
    class Recorder:
        def __init__(self) -> None:
            self.sent: list[StepOut] = []

        def send(self, to: Address, message: Any) -> bool:
            self.sent.append(message)
            return True

        def pressure(self, to: Address) -> float:
            return 0.0
    monkeypatch.setattr(outputs, "MAX_PENDING_BYTES", 1000)
    sender, wide = Recorder(), Logprobs(100, bytes(4), bytes(4), bytes(400), bytes(400))
    out = Outputs(0, 1, sender)
    for rid in range(4):
        seq = sequence(rid, [1, 2])
        seq.tokens.append(3)
        out.emit(seq, wide)
    out.flush(1)
    assert [len(message.items) for message in sender.sent] == [2, 2]
    assert [len(message.opens) for message in sender.sent] == [4, 0] and not out
