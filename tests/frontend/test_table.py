"""The request table: one terminal event each, deltas in order, nothing held after close."""
from __future__ import annotations

import dataclasses

import pytest

from frontend.admission import Admission
from frontend.request import Request
from pipeline.config import LimitsConfig
from pipeline.errors import QuartetError
from pipeline.messages import (
    TEXT_ROW,
    AbortReason,
    Deltas,
    DetokenizeQuery,
    Finish,
    Kind,
    Load,
    State,
    TokenizeAnswer,
    TokenizeQuery,
    pack_ids,
)
from pipeline.params import DetokSpec
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.frontend.world import World, usage


def text_of(request: Request) -> dict[int, str]:
    texts = {c.index: "" for c in request.choices}
    for update in request.take():
        texts[update.index] += update.text
    return texts


def test_all_are_ready_but_for_engines_that_were_given_up() -> None:
    w = World()
    assert w.stages.all_ready()
    w.beacon(Kind.ENGINE, 0, state=State.STARTING)
    assert not w.stages.all_ready()
    w.beacon(Kind.LAUNCHER, 0, facts_json=b'{"failed_models": [0]}')
    assert w.stages.all_ready()
    del w.latest[Kind.TOKENIZER, 0]
    assert not w.stages.all_ready()


def test_request_is_submitted_with_route_epochs_and_fresh_ids() -> None:
    w = World()
    w.beacon(Kind.ENGINE, 0, epoch=5)
    w.open("a", "b", n=2)
    first, second = w.submits()
    assert (first.text, second.text) == ("a", "b")
    assert (first.n, first.choice, first.history) == (2, 0, b"")
    assert first.route.engine_epoch == 5 and first.route.tokenizer_epoch == 1
    assert first.rid % 256 == 0 and second.rid % 256 == 0 and first.rid != second.rid
    w.table.assert_invariants()


def test_deltas_reach_the_reader_merged_and_the_last_one_ends_the_request() -> None:
    w = World()
    request = w.open()
    rid = w.submits()[0].rid
    w.delta(rid, "Hel", [5], usage=usage(prompt=7, cached=2))
    w.delta(rid, "lo", [6, 7], offset=3, start=1)
    (update,) = request.take()
    assert (update.text, list(update.ids), update.finish, update.completion_tokens) == ("Hello", [5, 6, 7], 0, 3)
    assert not request.done and request.take() == []
    w.delta(rid, "!", [8], offset=5, start=3, finish=Finish.STOP_STRING, stop="END")
    (last,) = request.take()
    assert (last.text, last.finish, last.stop) == ("!", Finish.STOP_STRING, "END")
    assert request.done and request.error is None
    assert (request.prompt_tokens, request.cached_tokens, request.completion_tokens) == (7, 2, 4)
    w.table.close(request)
    assert len(w.table) == 0 and w.counts.reasons == [None] and not w.aborts(Kind.ENGINE)


def test_choices_are_numbered_prompt_major_and_end_one_by_one() -> None:
    w = World()
    request = w.open("a", "b", n=2)
    first, second = w.submits()
    w.delta(second.rid + 1, "last", [1], finish=Finish.EOS)
    w.delta(first.rid, "first", [1], finish=Finish.LENGTH)
    assert [(u.index, u.text) for u in request.take()] == [(3, "last"), (0, "first")]
    assert not request.done
    w.delta(first.rid + 1, finish=Finish.EOS)
    w.delta(second.rid, finish=Finish.EOS)
    assert request.done and request.error is None


def test_deltas_for_finished_aborted_and_unknown_ids_are_ignored_and_counted() -> None:
    w = World()
    request = w.open(n=2)
    rid = w.submits()[0].rid
    w.delta(rid, "x", [1], finish=Finish.EOS)
    w.delta(rid, "y", [2], offset=1, start=1)               # finished
    w.delta(rid + 2, "z", [2])                              # no such child
    w.delta(rid + 256, "z", [2])                            # no such family
    assert text_of(request) == {0: "x", 1: ""}
    w.table.close(request)
    w.delta(rid + 1, "late", [3])
    assert w.counts.strangers == ["delta"] * 4


@pytest.mark.parametrize(("ids", "text", "cut"), [
    ([1], "abc", 0), ([1, 2, 3], "abc", 0), ([1, 2], "ab", 0), ([1, 2], "abcd", 0), ([1, 2], "abc", 1)])
def test_rows_that_do_not_fit_their_ids_and_text_are_a_bad_frame_of_which_nothing_is_taken(
        ids: list[int], text: str, cut: int) -> None:
    w = World()
    request = w.open()
    row = TEXT_ROW.pack(w.submits()[0].rid, 0, 0, 2, 3)
    with pytest.raises(BadFrame):
        w.table.handle(Deltas(0, 1, [], row[cut:], pack_ids(ids), text))
    assert not request.take() and not request.choices[0].ids
    w.table.handle(Deltas(0, 1, [], row, pack_ids([1, 2]), "abc"))
    assert text_of(request) == {0: "abc"} and list(request.choices[0].ids) == [1, 2]


def test_repeated_output_is_cut() -> None:
    w = World()
    request = w.open()
    rid = w.submits()[0].rid
    w.delta(rid, "abc", [1, 2])
    w.delta(rid, "bcd", [2, 3], offset=1, start=1)
    w.delta(rid, "ab", [1], offset=0, start=0)
    assert text_of(request) == {0: "abcd"} and list(request.choices[0].ids) == [1, 2, 3]
    assert w.counts.again == []


@pytest.mark.parametrize("gap", [{"offset": 4}, {"start": 3}])
def test_missing_output_is_computed_again_from_what_is_there(gap: dict[str, int]) -> None:
    w = World()
    request = w.open()
    (old,) = w.submits()
    w.admit(old, [9, 8])
    w.delta(old.rid, "abc", [1, 2])
    w.delta(old.rid, "xyz", [4], **{"offset": 3, "start": 2} | gap)
    old, new = w.submits()
    assert w.aborts(Kind.ENGINE) == [old.rid] and w.counts.again == ["gap"]
    assert new.history == b"\1\0\0\0\2\0\0\0" and new.ids == b"\t\0\0\0\b\0\0\0" and new.text is None
    w.delta(new.rid, "def", [3], offset=3, start=2, finish=Finish.EOS)
    assert text_of(request) == {0: "abcdef"} and request.done


def test_gaps_without_end_end_the_request() -> None:
    w = World()
    request = w.open()
    for _ in range(6):
        w.delta(w.submits()[-1].rid, "x", [1], offset=1)
    assert request.error is not None and request.error.code == "internal_error"
    assert len(w.submits()) == 6


def test_a_gap_of_a_later_child_leaves_its_siblings_alone() -> None:
    w = World()
    request = w.open(n=3)
    (old,) = w.submits()
    w.delta(old.rid + 1, "?", [1], offset=1)
    assert w.aborts(Kind.ENGINE) == [old.rid + 1]
    new = w.submits()[1]
    assert (new.n, new.choice) == (1, 1)
    w.delta(old.rid, "zero", [1], finish=Finish.EOS)
    w.delta(new.rid, "one", [1], finish=Finish.EOS)
    w.delta(old.rid + 2, "two", [1], finish=Finish.EOS)
    assert text_of(request) == {0: "zero", 1: "one", 2: "two"} and request.done


def test_a_gap_of_child_0_takes_its_siblings_along_since_its_id_is_the_familys() -> None:
    w = World()
    w.open(n=2)
    (old,) = w.submits()
    w.delta(old.rid + 1, "b", [7])
    w.delta(old.rid, "?", [1], offset=1)
    again = w.submits()[1:]
    assert [(s.n, s.choice, s.history) for s in again] == [(1, 0, b""), (1, 1, b"\7\0\0\0")]


def test_failures_end_the_request_once_and_abort_the_rest() -> None:
    w = World()
    request = w.open("a", "b")
    first, second = w.submits()
    w.fail(first.rid, "context_length_exceeded", "too long", "prompt")
    assert request.done and request.error is not None
    assert (request.error.code, request.error.message, request.error.param) == (
        "context_length_exceeded", "too long", "prompt")
    assert set(w.aborts(Kind.ENGINE)) == {first.rid, second.rid} == set(w.aborts(Kind.TOKENIZER))
    w.fail(second.rid)
    w.delta(second.rid, "x", [1], finish=Finish.EOS)
    assert request.error.code == "context_length_exceeded" and request.take() == []
    w.table.close(request)
    w.table.close(request)
    assert len(w.table) == 0 and w.counts.reasons == [AbortReason.ERROR]


def test_unknown_failure_codes_become_internal_errors_without_their_text() -> None:
    w = World()
    request = w.open()
    w.fail(w.submits()[0].rid, "made_up", "secret path")
    assert request.error is not None and request.error.code == "internal_error" and "secret" not in str(request.error)


@pytest.mark.parametrize(("late", "code"), [(True, "timeout"), (False, "internal_error")])
def test_an_abort_by_the_engine_is_a_timeout_only_after_the_deadline(late: bool, code: str) -> None:
    w = World()
    request = w.open(deadline_ns=w.now if late else w.now + 10**12)
    w.delta(w.submits()[0].rid, finish=Finish.ABORT)
    assert request.error is not None and request.error.code == code


def test_close_aborts_what_is_unfinished_where_it_may_be() -> None:
    w = World()
    request = w.open("a", "b")
    first, second = w.submits()
    w.admit(second)
    w.table.close(request, AbortReason.CLIENT_GONE)
    assert w.aborts(Kind.TOKENIZER) == [first.rid]          # the tokenizer has let go of the second
    assert sorted(w.aborts(Kind.ENGINE)) == [first.rid, second.rid]
    assert w.counts.reasons == [AbortReason.CLIENT_GONE]
    w.table.assert_invariants()


def test_permit_is_released_with_the_request() -> None:
    w, admission = World(), Admission(LimitsConfig(max_requests=1))
    request = w.table.open(w.spec(), lambda: None, admission.acquire(10, 10))
    with pytest.raises(QuartetError) as refused:
        admission.acquire(1, 1)
    assert refused.value.code == "server_overloaded"
    w.table.close(request)
    admission.assert_invariants()
    admission.acquire(1, 1).release()
    assert admission.requests == 0


def test_permit_is_released_when_the_request_is_not_accepted() -> None:
    w, admission = World(), Admission(LimitsConfig())
    w.sender.full.add(Address(Kind.TOKENIZER, 0))
    with pytest.raises(QuartetError) as refused:
        w.table.open(w.spec("a", "b"), lambda: None, admission.acquire(1, 1))
    assert refused.value.code == "server_overloaded" and admission.requests == 0 and len(w.table) == 0


def test_what_exceeds_a_limit_alone_is_let_in_alone() -> None:
    admission = Admission(LimitsConfig(max_tokens=10))
    with admission.acquire(1, 100), pytest.raises(QuartetError):
        admission.acquire(1, 1)
    assert admission.tokens == 0


def test_deadline_backstop() -> None:
    w = World()
    request = w.open(deadline_ns=w.now + 10 * 10**9)
    w.pass_time(11)
    assert not request.done                                 # the engine's turn
    w.pass_time(1.5)
    assert request.error is not None and request.error.code == "timeout"
    assert len(w.aborts(Kind.ENGINE)) == 1
    w.table.close(request)
    assert w.counts.reasons == [AbortReason.DEADLINE]


def test_draining_refuses_new_requests_and_ends_the_old_ones_at_last() -> None:
    w = World()
    request = w.open()
    w.table.draining = True
    with pytest.raises(QuartetError) as refused:
        w.open()
    assert refused.value.code == "draining" and not request.done
    w.table.fail_all(QuartetError("draining", "over"))
    assert request.error is not None and request.error.code == "draining"


def test_a_model_that_was_never_ready_is_refused_at_once() -> None:
    w = World()
    del w.latest[Kind.ENGINE, 0]
    fresh = World()
    fresh.stages._ever_ready.clear()
    fresh.latest[Kind.ENGINE, 0].beacon.state = State.STARTING
    fresh.stages.note()
    with pytest.raises(QuartetError) as refused:
        fresh.open()
    assert refused.value.code == "engine_unavailable" and len(fresh.table) == 0


def test_a_model_that_the_launcher_gave_up_fails_its_requests() -> None:
    w = World()
    request = w.open()
    w.beacon(Kind.LAUNCHER, facts_json=b'{"failed_models": [0]}')
    w.table.tick()
    assert request.error is not None and request.error.code == "engine_unavailable"
    with pytest.raises(QuartetError):
        w.open()


def test_least_loaded_engine_and_tokenizer_are_chosen() -> None:
    model = dataclasses.replace(World().config.models[0], replicas=2)
    w = World(models=(model,), tokenizers=2)
    w.beacon(Kind.ENGINE, 0, load=Load(running=3))
    w.open("a" * 100, n=2)
    w.open("b")
    w.open("c", n=2)
    assert [s.route.engine for s in w.submits()] == [1, 1, 0]
    assert [s.route.tokenizer for s in w.submits()] == [0, 1, 1]


def test_a_silent_stage_is_avoided_while_another_is_there() -> None:
    w = World(tokenizers=2)
    w.now += 10 * 10**9
    for kind, index in w.latest:
        if (kind, index) != (Kind.TOKENIZER, 0):
            w.latest[kind, index].at_ns = w.now
    w.open()
    assert w.submits()[0].route.tokenizer == 1
    w.latest[Kind.TOKENIZER, 1].at_ns = 0
    w.open()
    assert w.submits()[1].route.tokenizer in (0, 1)          # silence is no death: both stay candidates


def test_prompt_text_and_ids_come_ahead_of_the_first_text() -> None:
    w = World()
    request = w.open(detok=DetokSpec(echo=True), want_prompt_ids=True)
    (submit,) = w.submits()
    w.delta(submit.rid, "out", [1], prompt_text="hello", usage=usage())
    assert request.take() == []                             # the prompt's ids are not known yet
    before = w.wakes
    w.admit(submit, [4, 5])
    assert w.wakes > before
    assert [u.text for u in request.take()] == ["out"] and request.spec.prompts[0].echo == "hello"


def test_a_message_that_no_frontend_receives_is_a_bad_frame() -> None:
    w = World()
    with pytest.raises(BadFrame):
        w.table.handle(DetokenizeQuery(1, 1, 0, b""))


# ---- questions to a tokenizer ----

def ask(rid: int, epoch: int) -> TokenizeQuery:
    return TokenizeQuery(rid, epoch, 0, "text", None, True, False)


def test_a_query_is_answered_once() -> None:
    w = World()
    woken: list[int] = []
    query = w.table.query(ask, lambda: woken.append(1), w.now + 10**10)
    (_, sent), = w.sender.sent
    w.table.handle(TokenizeAnswer(sent.rid, b"\1\0\0\0", None))
    w.table.handle(TokenizeAnswer(sent.rid, b"", None))
    assert woken == [1] and query.answer is not None and query.answer.ids == b"\1\0\0\0" and len(w.table) == 0


def test_a_query_is_asked_again_after_the_tokenizers_death() -> None:
    w = World()
    query = w.table.query(ask, lambda: None, w.now + 10**10)
    w.restart(Kind.TOKENIZER)
    w.pass_time(0.1)
    first, second = [m for _, m in w.sender.sent]
    assert second.rid != first.rid and second.tokenizer_epoch == 2
    w.table.handle(TokenizeAnswer(first.rid, b"", None))
    assert query.answer is None
    w.table.handle(TokenizeAnswer(second.rid, b"", None))
    assert query.answer is not None


def test_a_query_fails_by_message_or_deadline() -> None:
    w = World()
    first = w.table.query(ask, lambda: None, w.now + 10**10)
    w.fail(first.rid, "invalid_value")
    second = w.table.query(ask, lambda: None, w.now + 10**10)
    w.pass_time(11)
    assert first.error is not None and first.error.code == "invalid_value"
    assert second.error is not None and second.error.code == "timeout" and len(w.table) == 0
