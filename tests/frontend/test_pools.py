"""Pooling requests in the table: every input comes exactly once, whatever dies, and each request ends exactly once."""
from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from frontend.admission import Admission
from frontend.pools import MAX_RESULT_BYTES, PoolRequest, PoolSpec
from pipeline.config import LimitsConfig, ModelConfig
from pipeline.errors import QuartetError
from pipeline.messages import (
    Kind,
    Pooled,
    PoolHanded,
    PoolText,
    State,
    SubmitPool,
    pack_ids,
)
from pipeline.params import PoolParams
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.frontend.world import SECOND, World


class PoolWorld(World):
    """A World whose one model embeds."""

    def __init__(self, replicas: int = 1, **changes: Any) -> None:
        model = ModelConfig(names=("embedder",), path="/nowhere", task="embed", max_model_len=64, replicas=replicas)
        super().__init__(models=(model,), **changes)

    def pool(self, count: int = 3, **changes: Any) -> PoolRequest:
        inputs = [PoolText(i, text="x" * (i + 1)) for i in range(count)]
        spec = PoolSpec(model=0, inputs=inputs, params=PoolParams("embed"), **changes)
        request = self.table.pool(spec, self._wake)
        self.table.assert_invariants()
        return request

    def pools(self) -> list[SubmitPool]:
        return [m for _, m in self.sender.sent if isinstance(m, SubmitPool)]

    def answer(self, submit: SubmitPool, *indices: int, epoch: int | None = None) -> None:
        """Results of some inputs of a submission (all where none is named): input i gives (i, i)."""
        wanted = indices or [t.index for t in submit.inputs]
        route = submit.route
        self.table.handle(Pooled(
            route.engine, route.engine_epoch if epoch is None else epoch, submit.rid, pack_ids(wanted),
            pack_ids([5] * len(wanted)), pack_ids([1] * len(wanted)), np.array([[i, i] for i in wanted], np.float32)))
        self.table.assert_invariants()

    def hand(self, submit: SubmitPool) -> None:
        self.table.handle(PoolHanded(0, 1, submit.rid))


def values(request: PoolRequest) -> list[float]:
    return [float(rows[0, 0]) for rows in request.results()]


def test_results_in_any_order_make_one_answer() -> None:
    w = PoolWorld()
    request = w.pool(4)
    (submit,) = w.pools()
    assert [t.index for t in submit.inputs] == [0, 1, 2, 3] and submit.alone is False
    w.answer(submit, 3, 1)
    assert not request.done and w.wakes == 0
    w.answer(submit, 0, 2)
    assert request.done and w.wakes == 1 and values(request) == [0, 1, 2, 3] and request.prompt_tokens == 20
    w.table.pools.close(request)
    assert len(w.table) == 0 and w.counts.reasons == [None] and w.aborts(Kind.ENGINE) == []


@pytest.mark.parametrize("kind", [Kind.TOKENIZER, Kind.ENGINE])
def test_after_a_death_only_what_is_missing_is_sent_again(kind: Kind) -> None:
    w = PoolWorld()
    request = w.pool(4)
    (old,) = w.pools()
    w.answer(old, 1, 2)
    w.restart(kind)
    old, new = w.pools()
    assert new.rid != old.rid and [t.index for t in new.inputs] == [0, 3]
    assert w.aborts(Kind.ENGINE) == [old.rid] and w.counts.again == [kind.name.lower()]
    w.answer(old, 0, epoch=1)                                                  # the last words of a ghost
    assert w.counts.strangers == ["pooled"] and not request.done
    w.answer(new)
    assert values(request) == [0, 1, 2, 3] and w.wakes == 1


def test_a_detokenizers_death_is_nobodys_business() -> None:
    w = PoolWorld()
    w.pool()
    w.restart(Kind.DETOKENIZER)
    assert len(w.pools()) == 1


def test_one_that_kills_its_engine_twice_runs_alone_and_ends_at_the_third_death() -> None:
    w = PoolWorld()
    poison = w.pool()
    for deaths in (1, 2):
        w.restart(Kind.ENGINE)
        assert w.pools()[-1].alone is (deaths == 2)
    w.restart(Kind.ENGINE)
    assert poison.error is not None and poison.error.code == "poisoned_request" and w.wakes == 1
    assert len(w.pools()) == 3


def test_two_that_run_alone_take_turns() -> None:
    w = PoolWorld()
    first, second = w.pool(), w.pool()
    w.restart(Kind.ENGINE)
    w.restart(Kind.ENGINE)
    alone = [m for m in w.pools() if m.alone]
    assert len(alone) == 1                                                     # the other one waits here
    w.answer(alone[0])
    w.table.tick()
    later = [m for m in w.pools() if m.alone][1:]
    assert first.done and len(later) == 1
    w.answer(later[0])
    assert second.done


def test_a_large_request_is_shared_by_the_replicas() -> None:
    w = PoolWorld(replicas=2)
    request = w.pool(80)
    one, two = w.pools()
    assert {one.route.engine, two.route.engine} == {0, 1} and len(one.inputs) == len(two.inputs) == 40
    w.answer(one)
    assert not request.done
    w.restart(Kind.ENGINE, two.route.engine)
    w.answer(w.pools()[-1])
    assert values(request) == list(range(80))


def test_replicas_that_die_at_once_do_not_make_a_request_suspect() -> None:
    w = PoolWorld(replicas=2)
    w.pool(80)
    w.restart(Kind.ENGINE, 0)
    w.restart(Kind.ENGINE, 1)
    assert len(w.pools()) == 5 and sum(m.alone for m in w.pools()) == 1         # the half that moved met both deaths


def test_small_requests_go_to_the_replica_with_less_to_do() -> None:
    w = PoolWorld(replicas=2)
    w.pool(20)
    w.pool(2)
    w.pool(2)
    first, second, third = (m.route.engine for m in w.pools())
    assert second == third != first


def test_a_failure_names_the_input_in_the_callers_words() -> None:
    w = PoolWorld()
    request = w.pool(2, name_of="documents[{}]".format)
    (submit,) = w.pools()
    w.fail(submit.rid, "context_length_exceeded", "'input[1]' is too long", "input[1]")
    assert request.error is not None and (request.error.message, request.error.param) == (
        "'documents[1]' is too long", "documents[1]")
    assert w.aborts(Kind.ENGINE) == w.aborts(Kind.TOKENIZER) == [submit.rid]
    w.table.pools.close(request)
    assert len(w.table) == 0


def test_closing_aborts_and_gives_the_permit_back() -> None:
    w, admission = PoolWorld(), Admission(LimitsConfig())
    request = w.table.pool(PoolSpec(model=0, inputs=[PoolText(0, text="x")], params=PoolParams("embed")), w._wake,
                           admission.acquire(10, 10))
    w.table.pools.close(request)
    w.table.pools.close(request)
    (submit,) = w.pools()
    assert admission.requests == 0 and w.aborts(Kind.ENGINE) == [submit.rid]
    w.answer(submit)
    assert w.counts.strangers == ["pooled"]


def test_a_request_that_cannot_be_accepted_leaves_nothing() -> None:
    w, admission = PoolWorld(), Admission(LimitsConfig())
    w.sender.full.add(Address(Kind.TOKENIZER, 0))
    spec = PoolSpec(model=0, inputs=[PoolText(0, text="x")], params=PoolParams("embed"))
    with pytest.raises(QuartetError, match="more to do"):
        w.table.pool(spec, w._wake, admission.acquire(10, 10))
    w.table.draining = True
    with pytest.raises(QuartetError, match="shutting down"):
        w.table.pool(spec, w._wake, admission.acquire(10, 10))
    assert len(w.table) == 0 and admission.requests == 0
    w.table.assert_invariants()


def test_an_engine_without_room_refuses_what_is_new_and_not_what_goes_on() -> None:
    w = PoolWorld()
    fresh, going = w.pool(), w.pool()
    w.fail(w.pools()[0].rid, "server_overloaded")
    assert fresh.error is not None and fresh.error.status == 429
    w.restart(Kind.ENGINE)
    w.fail(w.pools()[-1].rid, "server_overloaded")
    assert going.error is None
    w.table.tick()
    w.answer(w.pools()[-1])
    assert going.done and going.error is None


def test_what_the_engine_lost_is_sent_again_and_what_it_need_not_hold_is_aborted() -> None:
    w = PoolWorld()
    w.pool()
    (submit,) = w.pools()
    for _ in range(3):                                   # still with the tokenizer: no census can miss it
        w.pass_time(6)
        w.census()
    assert len(w.pools()) == 1
    w.hand(submit)
    w.census(submit.rid, 0x600)
    assert w.aborts(Kind.ENGINE) == [0x600]
    for _ in range(2):
        w.pass_time(6)
        w.census()
    assert len(w.pools()) == 2 and w.counts.again == ["census"]


def test_deadlines_and_models_that_were_given_up() -> None:
    w = PoolWorld()
    late = w.pool(deadline_ns=w.now + SECOND)
    w.pass_time(2.5)
    assert not late.done                                 # the engine's clock comes first
    w.pass_time(1)
    assert late.error is not None and late.error.code == "timeout"
    w.beacon(Kind.ENGINE, 0, 2, State.STARTING)
    waiting = w.pool(deadline_ns=w.now + 5 * SECOND)     # no engine holds it: its own clock
    w.pass_time(5.5)
    assert waiting.error is not None and waiting.error.code == "timeout"
    lost = w.pool()
    w.beacon(Kind.LAUNCHER, 0, facts_json=b'{"failed_models": [0]}')
    w.table.tick()
    assert lost.error is not None and lost.error.code == "engine_unavailable"


def test_results_that_cannot_be_are_bad_frames() -> None:
    w = PoolWorld()
    request = w.pool()
    (submit,) = w.pools()
    good = [pack_ids([0]), pack_ids([5]), pack_ids([1]), np.zeros((1, 2), np.float32)]
    for place, wrong in ((0, b"\0"), (0, pack_ids([0, 1])), (2, pack_ids([2])), (3, np.zeros(2, np.float32)),
                         (3, np.zeros((1, 2), np.float16))):
        with pytest.raises(BadFrame):
            w.table.handle(Pooled(0, 1, submit.rid, *[wrong if i == place else v for i, v in enumerate(good)]))
        w.table.assert_invariants()
    w.table.handle(Pooled(0, 1, submit.rid, pack_ids([9]), *good[1:]))         # an input that it does not have
    assert not request.done


def test_an_answer_beyond_all_bounds_is_refused() -> None:
    w = PoolWorld()
    request = w.pool(2)
    (submit,) = w.pools()
    rows = np.broadcast_to(np.float32(0), (MAX_RESULT_BYTES // 4096 + 1, 1024))
    w.table.handle(Pooled(0, 1, submit.rid, pack_ids([0]), pack_ids([5]), pack_ids([len(rows)]), rows))
    assert request.error is not None and request.error.code == "invalid_value"


@pytest.mark.parametrize("seed", range(40))
def test_any_interleaving_of_deaths_gives_every_input_once(seed: int) -> None:
    rng, w = random.Random(seed), PoolWorld(replicas=2, tokenizers=2)
    requests = [w.pool(rng.randint(1, 90)) for _ in range(3)]
    restarts = 0
    for _ in range(200):
        open_ones = [m for m in w.pools() if w.table.pools.knows(m.rid)]
        roll = rng.random()
        if roll < 0.03 and restarts < 2:
            restarts += 1
            w.restart(Kind.ENGINE, rng.randrange(2))
        elif roll < 0.08:
            w.restart(Kind.TOKENIZER, rng.randrange(2))
        elif roll < 0.2:
            w.pass_time(rng.random() * 3)
        elif open_ones:
            submit = rng.choice(open_ones)
            indices = [t.index for t in submit.inputs]
            w.answer(submit, *rng.sample(indices, rng.randint(1, len(indices))))
        w.table.assert_invariants()
    for _ in range(5):
        for submit in w.pools():
            w.answer(submit)
    for request in requests:
        assert request.error is None and values(request) == list(range(len(request.rows)))
        w.table.pools.close(request)
    assert w.wakes == 3 and len(w.table) == 0
    w.table.assert_invariants()
