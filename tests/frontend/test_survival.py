"""Deaths at every phase: what was accepted goes on under a fresh id with its output so far, and ends exactly once."""
from __future__ import annotations

import random
from dataclasses import replace

import pytest

from frontend.request import Request
from pipeline.messages import Finish, Kind, State, Submit, pack_ids, unpack_ids
from pipeline.params import DetokSpec, SamplingParams
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.frontend.world import World, config, usage

SEED = SamplingParams(max_tokens=16, seed=77)


@pytest.mark.parametrize("kind", [Kind.TOKENIZER, Kind.ENGINE, Kind.DETOKENIZER])
def test_before_admission_the_whole_family_is_sent_again(kind: Kind) -> None:
    w = World()
    w.open("hello", n=3, sampling=SEED)
    (old,) = w.submits()
    w.restart(kind)
    old, new = w.submits()
    assert new.rid != old.rid and (new.text, new.n, new.choice, new.history, new.sampling) == ("hello", 3, 0, b"", SEED)
    assert w.aborts(Kind.TOKENIZER) == w.aborts(Kind.ENGINE) == [old.rid]
    assert w.counts.again == [kind.name.lower()]
    w.table.assert_invariants()


def test_after_admission_a_tokenizers_death_is_nobodys_business() -> None:
    w = World()
    w.open()
    w.admit(w.submits()[0])
    w.restart(Kind.TOKENIZER)
    assert len(w.submits()) == 1 and w.aborts(Kind.ENGINE) == []


def test_output_counts_as_admission_when_the_message_is_late() -> None:
    w = World()
    request = w.open("hello")
    w.delta(w.submits()[0].rid, "a", [1])
    w.restart(Kind.TOKENIZER)
    assert len(w.submits()) == 1
    w.restart(Kind.ENGINE)
    new = w.submits()[1]
    assert new.text == "hello" and new.history == pack_ids([1]) and request.choices[0].deaths == 1


@pytest.mark.parametrize("kind", [Kind.ENGINE, Kind.DETOKENIZER])
def test_running_choices_go_on_one_by_one_with_their_history(kind: Kind) -> None:
    w = World()
    request = w.open("hello", n=3)
    (old,) = w.submits()
    w.admit(old, [7, 8])
    w.delta(old.rid, "zero", [1, 2])
    w.delta(old.rid + 1, "done", [3], finish=Finish.EOS)
    w.restart(kind)
    again = w.submits()[1:]
    assert [(s.n, s.choice, list(unpack_ids(s.history)), list(unpack_ids(s.ids)), s.text) for s in again] == [
        (1, 0, [1, 2], [7, 8], None), (1, 2, [], [7, 8], None)]
    assert w.aborts(Kind.ENGINE) == [old.rid] and w.aborts(Kind.TOKENIZER) == []
    w.delta(again[0].rid, "!", [9], offset=4, start=2, finish=Finish.EOS)
    w.delta(again[1].rid, "two", [1], finish=Finish.EOS)
    assert request.done and {u.index: u.text for u in request.take()} == {0: "zero!", 1: "done", 2: "two"}


def test_late_messages_of_the_dead_are_ignored() -> None:
    w = World()
    request = w.open()
    (old,) = w.submits()
    w.admit(old)
    w.delta(old.rid, "a", [1])
    w.restart(Kind.ENGINE)
    w.delta(old.rid, "b", [2], offset=1, start=1, finish=Finish.EOS)
    w.fail(old.rid)
    w.admit(old)
    assert not request.done and w.counts.strangers == ["delta", "failed", "admitted"]


def test_a_continuation_waits_until_the_stage_is_ready() -> None:
    w = World()
    w.open()
    w.admit(w.submits()[0])
    w.beacon(Kind.ENGINE, 0, epoch=2, state=State.STARTING)
    w.pass_time(30)
    assert len(w.submits()) == 1
    w.beacon(Kind.ENGINE, 0, epoch=2, state=State.READY)
    assert len(w.submits()) == 2 and w.submits()[1].route.engine_epoch == 2


def test_a_continuation_is_not_refused_by_a_full_outbox() -> None:
    w = World()
    request = w.open()
    w.sender.full.add(Address(Kind.TOKENIZER, 0))
    w.restart(Kind.ENGINE)
    assert len(w.submits()) == 1 and not request.done
    w.sender.full.clear()
    w.pass_time(0.1)
    assert len(w.submits()) == 2


def test_waiting_ends_with_the_deadline() -> None:
    w = World()
    request = w.open(deadline_ns=w.now + 5 * 10**9)
    w.beacon(Kind.ENGINE, 0, epoch=2, state=State.STARTING)
    w.pass_time(5.1)
    assert request.error is not None and request.error.code == "timeout"


def test_a_new_request_waits_for_an_engine_that_is_being_replaced() -> None:
    w = World()
    w.beacon(Kind.ENGINE, 0, epoch=2, state=State.STARTING)
    request = w.open()
    assert w.submits() == [] and not request.done
    w.beacon(Kind.ENGINE, 0, epoch=2, state=State.READY)
    assert len(w.submits()) == 1


def test_after_two_deaths_it_runs_alone_and_after_three_it_is_refused() -> None:
    w = World()
    request = w.open()
    for epoch in range(3):
        submit = w.submits()[-1]
        assert submit.alone == (epoch == 2) and not request.done
        w.admit(submit)
        w.restart(Kind.ENGINE)
    assert request.error is not None and request.error.code == "poisoned_request" and not request.error.retryable
    assert len(w.submits()) == 3


def test_deaths_before_admission_do_not_count() -> None:
    w = World()
    request = w.open()
    for _ in range(5):
        w.restart(Kind.ENGINE)
    assert not request.done and not w.submits()[-1].alone


def test_requests_that_run_alone_take_turns() -> None:
    w = World()
    requests = [w.open("a"), w.open("b")]
    for _ in range(2):
        for submit in w.submits()[-2:]:
            w.admit(submit)
        w.restart(Kind.ENGINE)
    alone = [s for s in w.submits() if s.alone]
    assert len(alone) == 1
    w.admit(alone[0])
    w.restart(Kind.ENGINE)                                   # kills the first; the second was not there
    assert [r.error.code if r.error else None for r in requests] == ["poisoned_request", None]
    w.pass_time(0.1)
    second = w.submits()[-1]
    assert second.alone and second.rid != alone[0].rid
    w.delta(second.rid, "fine", [1], finish=Finish.EOS)
    assert requests[1].done and requests[1].error is None


def test_prompt_data_is_taken_once() -> None:
    w = World()
    sampling = SamplingParams(max_tokens=16, prompt_logprobs=0)
    request = w.open(detok=DetokSpec(echo=True), sampling=sampling)
    (old,) = w.submits()
    w.admit(old)
    w.delta(old.rid, "a", [1], prompt_text="hello", usage=usage(prompt=3, cached=1))
    w.restart(Kind.ENGINE)
    new = w.submits()[1]
    assert not new.detok.echo and new.sampling.prompt_logprobs == 0      # the log-probabilities did not come yet
    w.delta(new.rid, "b", [2], offset=1, start=1, usage=usage(prompt=3, cached=2), finish=Finish.EOS)
    assert request.cached_tokens == 1 and request.spec.prompts[0].echo == "hello"
    assert request.spec.detok.echo                                       # what the answer needs is unchanged


# ---- census ----

def test_census_aborts_orphans() -> None:
    w = World()
    request = w.open()
    rid = w.submits()[0].rid
    w.admit(w.submits()[0])
    w.census(rid, rid + 512)
    assert w.aborts(Kind.ENGINE) == [rid + 512]
    w.table.close(request)
    w.forget()
    w.census(rid)
    assert w.aborts(Kind.ENGINE) == [rid]


def test_census_never_aborts_a_finished_child_whose_family_runs() -> None:
    w = World()
    w.open(n=2)
    (submit,) = w.submits()
    w.admit(submit)
    w.delta(submit.rid, "x", [1], finish=Finish.STOP_STRING)   # its id is the family's: an abort would end child 1
    w.census(submit.rid, submit.rid + 1)
    assert w.aborts(Kind.ENGINE) == []


def test_silent_requests_missing_from_two_censuses_are_submitted_again() -> None:
    w = World()
    w.open(n=2)
    (old,) = w.submits()
    w.admit(old)
    w.pass_time(6)
    w.census(old.rid + 1)
    assert len(w.submits()) == 1
    w.pass_time(5)
    w.census(old.rid + 1)
    again = w.submits()[1:]
    assert [(s.n, s.choice) for s in again] == [(1, 0)] and w.counts.again == ["census"]
    w.delta(old.rid + 1, "b", [1], finish=Finish.EOS)
    w.delta(again[0].rid, "a", [1], finish=Finish.EOS)


def test_census_spares_what_is_heard_of_what_is_not_admitted_and_what_runs_elsewhere() -> None:
    w = World(models=(replace(config().models[0], replicas=2),))
    w.open("heard")
    w.open("not admitted")
    heard, _ = w.submits()
    w.admit(heard)
    for i in range(4):
        w.pass_time(6)
        w.delta(heard.rid, "x", [i], offset=i, start=i)
        w.census()
        w.census(engine=1)
        w.census(epoch=9)
    assert w.counts.again == []


def test_a_census_of_an_engine_that_does_not_exist_is_a_bad_frame() -> None:
    w = World()
    with pytest.raises(BadFrame):
        w.census(7, engine=60_000)
    assert not w.sender.sent                                               # above all no abort towards it


# ---- everything at once ----

class Pipeline:
    """A pipeline that computes `letters`: token i of choice c is the letter of (c + i); it can lose any stage."""

    LENGTH = 6

    def __init__(self, world: World, rng: random.Random) -> None:
        self.world, self.rng = world, rng
        self.running: dict[int, tuple[Submit, int, list[int], int]] = {}     # child -> submit, choice, ids, chars sent
        self.seen = 0

    def letters(self, choice: int, upto: int) -> str:
        return "".join(chr(97 + (choice + i) % 26) for i in range(upto))

    def step(self) -> None:
        """One random event."""
        w, rng = self.world, self.rng
        for submit in w.submits()[self.seen:]:
            for j in range(submit.n):
                history = list(unpack_ids(submit.history))
                self.running[submit.rid + j] = (submit, submit.choice + j, history, len(history))
        self.seen = len(w.submits())
        event = rng.random()
        if event < 0.06:
            kind = rng.choice([Kind.TOKENIZER, Kind.ENGINE, Kind.DETOKENIZER])
            w.restart(kind)
            if kind is Kind.ENGINE:
                self.running.clear()
        elif self.running:
            rid = rng.choice(list(self.running))
            submit, choice, ids, chars = self.running[rid]
            current = w.latest
            if submit.route.engine_epoch != current[Kind.ENGINE, 0].beacon.epoch \
                    or submit.route.detok_epoch != current[Kind.DETOKENIZER, 0].beacon.epoch:
                del self.running[rid]
                return
            if event < 0.3:
                w.admit(submit, [5])
                return
            ids = ids + [choice + len(ids)]
            finished = len(ids) == self.LENGTH
            if event < 0.33 and not finished:                # the delta is lost
                self.running[rid] = (submit, choice, ids, len(ids))
                return
            w.delta(rid, self.letters(choice, len(ids))[chars:], [ids[-1]], offset=chars, start=len(ids) - 1,
                    finish=Finish.LENGTH if finished else Finish.RUNNING)
            self.running[rid] = (submit, choice, ids, len(ids))
            if finished:
                del self.running[rid]


@pytest.mark.parametrize("seed", range(100))
def test_random_deaths_and_losses_change_no_text(seed: int) -> None:
    rng = random.Random(seed)
    w = World()
    pipeline = Pipeline(w, rng)
    requests: list[tuple[Request, dict[int, str]]] = []
    for _ in range(600):
        if rng.random() < 0.05 and len(requests) < 8:
            request = w.open("p", n=rng.choice([1, 1, 3]))
            requests.append((request, dict.fromkeys(range(len(request.choices)), "")))
        if rng.random() < 0.01 and requests:
            w.table.close(rng.choice(requests)[0])
        pipeline.step()
        w.table.assert_invariants()
        for request, texts in requests:
            for update in request.take():
                texts[update.index] += update.text
    for request, texts in requests:
        for index, text in texts.items():
            assert pipeline.letters(index, pipeline.LENGTH).startswith(text)
            if request.choices[index].finished:
                assert text == pipeline.letters(index, pipeline.LENGTH)
        if not request.closed and not request.done:
            assert all(c.finished or w.table._submissions.find(c.rid) for c in request.choices)
        w.table.close(request)
    w.table.assert_invariants()
    assert len(w.table) == 0 and not list(w.table._submissions)
