"""Beam search over one prompt, as transformers does it: the likeliest texts instead of drawn ones.

A search is fed by ordinary sequences of one token each, so that the scheduler, the cache and pre-emption need not know
it: in each round every hypothesis is computed once, as a child of the sequence whose KV it continues. What a search
gives is a function of the prompt and the parameters alone; after a death it is done again. Engine process, no torch.
"""
from __future__ import annotations

import dataclasses
import struct
from array import array
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from engine_proc.plan import Candidates, ItemResult
from engine_proc.request import Sequence
from pipeline.errors import QuartetError
from pipeline.logprobs import join_logprobs
from pipeline.messages import Finish, Logprobs


@dataclass(frozen=True, slots=True, eq=False)
class Hypothesis:
    """A text under way: its last token, what is before it, and the sum of the scores."""

    before: Hypothesis | None
    token: int
    score: float
    length: int
    logprobs: Logprobs | None            # of the token, where they are wanted

    def ids(self) -> array[int]:
        return array("I", [step.token for step in self._steps()])

    def told(self) -> Logprobs | None:
        parts = [step.logprobs for step in self._steps() if step.logprobs is not None]
        return join_logprobs(parts) if parts else None

    def _steps(self) -> list[Hypothesis]:
        steps: list[Hypothesis] = []
        step: Hypothesis | None = self
        while step is not None:
            steps.append(step)
            step = step.before
        return steps[::-1]


@dataclass(frozen=True, slots=True)
class Ended:
    """A complete hypothesis; the best has the highest `value`, its score over a power of its length."""

    value: float
    hypothesis: Hypothesis
    finish: Finish


class Hypotheses:
    """The state of one search: what runs, best first, and the best that have ended."""

    def __init__(self, width: int, length_penalty: float, early: str, max_tokens: int,
                 verdict: Callable[[int], Finish]) -> None:
        """`verdict`: how a token ends a text, RUNNING for most."""
        self.width, self.max_tokens = width, max_tokens
        self._penalty, self._early, self._verdict = length_penalty, early, verdict
        self.running: list[Hypothesis | None] = [None]      # None: nothing yet, the prompt alone
        self.ended: list[Ended] = []
        self.over = False

    def advance(self, found: list[tuple[Candidates, list[Logprobs | None]]]) -> list[int]:
        """Go on by one token: `found[i]` is what may follow `running[i]`. For each that runs now, whom it follows."""
        scores = np.concatenate([
            np.asarray(candidates.scores, np.float64) + (0.0 if one is None else one.score)
            for one, (candidates, _) in zip(self.running, found, strict=True)])
        parents = np.concatenate([np.full(len(c.ids), i) for i, (c, _) in enumerate(found)])
        places = np.concatenate([np.arange(len(c.ids)) for c, _ in found])
        length = 1 if self.running[0] is None else self.running[0].length + 1
        next_running: list[tuple[int, Hypothesis]] = []
        ended, can_end = list(self.ended), not (self._early == "true" and len(self.ended) >= self.width)
        for rank, number in enumerate(np.argsort(-scores, kind="stable").tolist()):
            if scores[number] == -np.inf or len(next_running) == self.width:
                break
            parent, place = int(parents[number]), int(places[number])
            candidates, told = found[parent]
            token = int(candidates.ids[place])
            hypothesis = Hypothesis(self.running[parent], token, float(scores[number]), length, told[place])
            finish = self._verdict(token) or (Finish.LENGTH if length == self.max_tokens else Finish.RUNNING)
            if not finish:
                next_running.append((parent, hypothesis))
            elif rank < self.width and can_end:             # the rest only fills the places of those that end
                ended.append(Ended(hypothesis.score / length ** self._penalty, hypothesis, finish))
        self.ended = sorted(ended, key=lambda one: -one.value)[:self.width]
        self.over = not next_running or length == self.max_tokens or not self._may_improve(next_running[0][1])
        self.running = [] if self.over else [hypothesis for _, hypothesis in next_running]
        return [] if self.over else [parent for parent, _ in next_running]

    def _may_improve(self, best: Hypothesis) -> bool:
        """Whether the best that runs might still end better than the worst that has ended."""
        if len(self.ended) < self.width:
            return True
        if self._early == "true":
            return False
        length = self.max_tokens if self._early == "never" and self._penalty > 0 else best.length
        return best.score / length ** self._penalty > self.ended[-1].value


class BeamSearch:
    """Ties one search to the engine: `choices` are what the caller sees, sequences that the scheduler never gets."""

    def __init__(self, choices: list[Sequence], arrival: int, new_rid: Callable[[], int]) -> None:
        first = self.first = choices[0]
        beam = first.sampling.beam
        assert beam is not None
        self.choices = list(choices)
        for choice in choices:
            choice.search, choice.leader = self, None
        self._arrival, self._new_rid = arrival, new_rid
        self._hypotheses = Hypotheses(beam.width, beam.length_penalty, beam.early, first.max_total - first.num_prompt,
                                      self._verdict)
        self.sequences = [self._sequence(array("I"), None, 0)]
        self._found: dict[int, tuple[Candidates, list[Logprobs | None]]] = {}       # rid -> its round's result

    def _verdict(self, token: int) -> Finish:
        if token not in self.first.stops:
            return Finish.RUNNING
        return Finish.EOS if token == self.first.eos_id else Finish.STOP_ID

    def _sequence(self, ids: array[int], parent: Sequence | None, number: int) -> Sequence:
        """One that computes what may follow `ids`; it shares the blocks of `parent`."""
        first = self.first
        tokens = first.tokens[:first.num_prompt] + ids
        sampling = first.sampling
        if ids:
            sampling = dataclasses.replace(sampling, prompt_logprobs=None)
        return Sequence(
            rid=self._new_rid(), route=first.route, choice=0, tokens=tokens, num_prompt=first.num_prompt,
            sampling=sampling, detok=first.detok, max_total=len(tokens) + 1, priority=first.priority, salt=first.salt,
            alone=first.alone, arrival=self._arrival + number, leader=parent, stops=first.stops, eos_id=first.eos_id,
            search=self, embeds=first.embeds, arrived_ns=first.arrived_ns,
            block_hashes=[] if parent is None else list(parent.block_hashes))

    def collected(self, seq: Sequence, result: ItemResult) -> list[Sequence]:
        """One of `sequences` was computed: those of the next round, once this one is complete."""
        assert result.candidates is not None
        if self._hypotheses.running[0] is None:              # the prompt itself
            for choice in self.choices:
                choice.num_cached, choice.started_ns = seq.num_cached, seq.started_ns
                choice.prompt_logprobs = list(seq.prompt_logprobs)
        self._found[seq.rid] = result.candidates, _told(result, self.first.sampling.logprobs)
        if len(self._found) < len(self.sequences):
            return []
        parents = self._hypotheses.advance([self._found[one.rid] for one in self.sequences])
        self._found = {}
        self.sequences = [
            self._sequence(hypothesis.ids(), self.sequences[parent], number)
            for number, (parent, hypothesis) in enumerate(zip(parents, self._hypotheses.running))
            if hypothesis is not None]
        return self.sequences

    @property
    def over(self) -> bool:
        return self._hypotheses.over

    def results(self) -> list[tuple[Sequence, Logprobs | None]]:
        """The finished choices with their log-probabilities. A choice without a hypothesis is in error."""
        done: list[tuple[Sequence, Logprobs | None]] = []
        for choice in self.choices:
            told = None
            if choice.choice < len(self._hypotheses.ended):
                best = self._hypotheses.ended[choice.choice]
                choice.tokens.extend(best.hypothesis.ids())
                choice.finish, told = best.finish, best.hypothesis.told()
                if best.finish is Finish.STOP_ID:
                    choice.stop_id = choice.tokens[-1]
            else:
                choice.finish = Finish.ERROR
                choice.error = QuartetError("no_token_left", "There are fewer texts than 'n' that the request allows.")
            done.append((choice, told))
        return done


def _told(result: ItemResult, k: int | None) -> list[Logprobs | None]:
    """The log-probabilities of each candidate: its own, and the k best of the step."""
    candidates = result.candidates
    assert candidates is not None
    if k is None or result.logprobs is None:
        return [None] * len(candidates.ids)
    step = result.logprobs
    return [Logprobs(step.k, struct.pack("<f", value), struct.pack("<I", place), step.top_ids, step.top_values)
            for place, value in enumerate(candidates.values.tolist(), 1)]
