"""The pooling engine as its peers see it: who is served when, what is answered, how everything ends."""
from __future__ import annotations

import random

import numpy as np
import pytest

from pipeline.ids import RidMaker
from pipeline.messages import Kind, StopHit
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.engine_proc.pool_world import PoolWorld

FRONTEND = Address(Kind.FRONTEND, 0)


@pytest.fixture(params=[0, 1], ids=["synchronous", "one ahead"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ---- answers -----------------------------------------------------------------------------------------------------

def test_every_input_is_answered_once_and_in_slices(depth: int) -> None:
    world = PoolWorld(depth=depth)
    rid = world.submit([[i + 1] * (i % 20 + 1) for i in range(50)])
    world.run()
    rows = world.rows(rid)
    assert [row.shape for row in rows] == [(1, 32)] * 50
    assert world.peers[0].lengths[rid] == {i: i % 20 + 1 for i in range(50)}
    assert len(world.peers[0].slices) > 5 and len(world.engine._over) == 1


def test_an_embedding_does_not_depend_on_its_batch() -> None:
    inputs = [[random.Random(i).randrange(1000) for _ in range(i % 9 + 1)] for i in range(20)]
    together, alone = PoolWorld(), PoolWorld()
    rid = together.submit(inputs)
    together.run()
    for ids, row in zip(inputs, together.rows(rid)):
        single = alone.submit([ids])
        alone.run()
        assert np.array_equal(alone.rows(single)[0], row)
        assert np.linalg.norm(row) == pytest.approx(1.0, abs=1e-5)


def test_tasks_give_a_row_per_input_or_per_token() -> None:
    world = PoolWorld()
    vectors = world.submit([[1, 2, 3], [4]], task="token_embed", dimensions=8, activation=False)
    world.run()
    assert [row.shape for row in world.rows(vectors)] == [(3, 8), (1, 8)]
    world = PoolWorld("classify")
    probs = world.submit([[1, 2, 3]])
    world.run()
    assert world.rows(probs)[0].shape == (1, 2) and world.rows(probs)[0].sum() == pytest.approx(1.0)
    world = PoolWorld("score")
    scores = world.submit([[1, 2, 1, 2], [1, 2, 7, 8]], types=[bytes([0, 0, 1, 1])] * 2)
    world.run()
    same, other = (row[0, 0] for row in world.rows(scores))
    assert same > 0.9 and other < 0.1


def test_slices_of_a_request_join_and_one_that_is_repeated_is_dropped() -> None:
    world = PoolWorld()
    first = world.make([[1], [2]], total=4)
    rid = world.post(first)
    world.turn()
    assert rid in world.engine.requests, "more of it is to come"
    world.post(world.make([[2], [3], [4]], rid=rid, start=1, total=4))
    world.run()
    assert len(world.rows(rid)) == 4 and world.dropped("duplicate") == 1
    world.post(first)
    world.run()
    assert world.dropped("aborted") == 1, "a submission that ended does not begin again"


# ---- order -------------------------------------------------------------------------------------------------------

def test_a_single_query_waits_for_no_more_than_the_batch_under_way(depth: int) -> None:
    world = PoolWorld(depth=depth)
    world.submit([[1] * 20 for _ in range(2048)], frontend=1)
    world.turn(5)
    query = world.submit([[5, 6, 7]])
    launched = len(world.runner.batches)
    world.turn(depth + 1)
    assert (query, 0) in world.runner.batches[launched]
    world.turn()
    assert world.rows(query)


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    world = PoolWorld()
    large = world.submit([[1] * 60 for _ in range(20)])
    for _ in range(250):
        world.submit([[2] * 30 for _ in range(3)], frontend=1)
        world.submit([[2] * 3], frontend=1)
        world.turn()
        world.now += 10**8
    assert world.engine.scheduler.waiting_tokens > 20 * 60, "the engine could never keep up"
    assert len(world.rows(large)) >= 8, "one every few seconds, beside small ones that wait as long"


def test_the_query_beside_a_starved_request_is_served_at_once() -> None:
    world = PoolWorld()
    large = world.submit([[1] * 60 for _ in range(20)], frontend=1)
    world.now += 5 * 10**9
    query = world.submit([[2] * 40])
    world.turn()
    assert sorted(rid for rid, _ in world.runner.batches[0]) == sorted([large, query])


def test_priority_outranks_size_where_it_is_switched_on() -> None:
    for policy, first in (("priority", 1), ("fcfs", 0)):
        world = PoolWorld(scheduling_policy=policy)
        rids = [world.submit([[1] * 40], priority=5), world.submit([[1] * 50], priority=-1)]
        world.turn()
        assert [rid for rid, _ in world.runner.batches[0]] == [rids[first]]


def test_a_batch_keeps_to_its_budget_and_takes_a_longer_input_by_itself() -> None:
    world = PoolWorld(max_step_tokens=32)
    rid = world.submit([[1] * n for n in (50, 5, 30, 12, 20, 33)])
    world.run()
    lengths = [[(50, 5, 30, 12, 20, 33)[i] for _, i in batch] for batch in world.runner.batches]
    assert [sum(batch) <= 32 or len(batch) == 1 for batch in lengths] == [True] * len(lengths)
    assert lengths[0] == [50] and [20, 12] in lengths and len(world.rows(rid)) == 6


def test_where_batches_are_padded_inputs_of_like_length_go_together() -> None:
    world = PoolWorld(padded=True, max_step_tokens=60)
    generator = random.Random(0)
    for _ in range(60):
        world.submit([[1] * generator.randint(1, 30) for _ in range(generator.randint(1, 4))])
    world.run()
    for batch in world.runner.batches:
        lengths = [world.peers[0].lengths[rid][index] for rid, index in batch]
        assert max(lengths) * len(lengths) <= 60 or len(lengths) == 1


def test_a_request_that_killed_engines_shares_no_batch() -> None:
    world = PoolWorld()
    world.submit([[1] * 2 for _ in range(10)])
    alone = world.submit([[1], [2]], alone=True)
    world.submit([[1] * 2 for _ in range(10)])
    world.run()
    assert [batch for batch in world.runner.batches if any(rid == alone for rid, _ in batch)] == [
        [(alone, 1)], [(alone, 0)]]


# ---- ends --------------------------------------------------------------------------------------------------------

def test_a_batch_that_fails_ends_only_the_request_that_is_to_blame(depth: int) -> None:
    world = PoolWorld(depth=depth, null_script="raise_id=13")
    good = [world.submit([[1, i], [2, i]]) for i in range(20, 24)]
    bad = world.submit([[13]])
    world.run()
    assert world.failure(bad) == "internal_error" and not world.rows(bad)
    assert [len(world.rows(rid)) for rid in good] == [2] * 4 and len(world.peers[0].failed) == 1


def test_an_engine_that_can_compute_nothing_any_more_ends() -> None:
    world = PoolWorld(null_script="raise_id=13")
    for _ in range(8):
        world.submit([[13]])
    with pytest.raises(RuntimeError):
        world.run()


def test_numbers_that_are_none_end_their_request_only() -> None:
    world = PoolWorld(null_script="nan_id=13")
    bad, good = world.submit([[1], [13], [2]]), world.submit([[1]])
    world.run()
    assert world.failure(bad) == "numerical_error" and "input 1" in world.peers[0].messages[bad]
    assert not world.rows(bad) and len(world.rows(good)) == 1


def test_what_the_model_cannot_do_is_refused() -> None:
    world = PoolWorld(max_waiting=1)
    for values, code in (
            ({"task": "classify"}, "invalid_value"), ({"dimensions": 33}, "invalid_value"),
            ({"inputs": [[1000]]}, "invalid_value"), ({"inputs": [[]]}, "invalid_value"),
            ({"inputs": [[1] * 65]}, "context_length_exceeded"), ({"types": [b"\0"]}, "invalid_value"),
            ({"types": [b"\2\2"]}, "invalid_value")):
        rid = world.submit(**({"inputs": [[1, 2]]} | values))
        world.turn()
        assert world.failure(rid) == code, values
    world.submit([[1] * 60, [1] * 60])
    rid = world.submit([[1]])
    world.run()
    assert world.failure(rid) == "server_overloaded"


def test_a_bad_slice_ends_the_whole_request() -> None:
    world = PoolWorld()
    rid = world.submit([[1] * 60, [2] * 60], total=5)
    world.turn()
    world.post(world.make([[5000]], rid=rid, start=2, total=5))
    world.post(world.make([[1]], rid=rid, start=3, total=5))
    world.run()
    assert world.failure(rid) == "invalid_value" and len(world.rows(rid)) == 1


def test_an_aborted_request_is_forgotten_and_its_late_slices_too(depth: int) -> None:
    world = PoolWorld(depth=depth)
    rid = world.submit([[1] * 60 for _ in range(9)], total=10)
    world.turn(2)
    world.abort(rid)
    world.post(world.make([[1]], rid=rid, start=9, total=10))
    world.run()
    assert len(world.rows(rid)) < 9 and world.failure(rid) is None and world.dropped("aborted") == 1
    early = world.make([[1]])
    world.abort(early.rid)
    world.post(early)
    world.run()
    assert not world.rows(early.rid)


def test_a_deadline_ends_what_is_not_done() -> None:
    world = PoolWorld()
    rid = world.submit([[1] * 60 for _ in range(9)], deadline_ns=world.now + 100)
    world.turn(2)
    assert world.engine.next_timer_ns() == world.now + 100
    world.now += 100
    world.run()
    assert world.failure(rid) == "timeout" and len(world.rows(rid)) == 2


def test_a_frontend_that_takes_nothing_gets_nothing_computed_and_others_go_on() -> None:
    world = PoolWorld()
    world.refusing.add(FRONTEND)
    slow, quick = world.submit([[1] * 60 for _ in range(9)]), world.submit([[1] * 60 for _ in range(9)], frontend=1)
    for _ in range(40):
        world.turn()
        world.now += 10**7
    assert len(world.rows(quick)) == 9 and not world.rows(slow)
    assert sum(rid == slow for batch in world.runner.batches for rid, _ in batch) == 1
    assert not world.engine.has_work() and world.engine.next_timer_ns() is not None
    world.refusing.clear()
    for _ in range(40):
        world.turn()
        world.now += 10**7
    assert len(world.rows(slow)) == 9


def test_what_belongs_to_others_is_dropped() -> None:
    world = PoolWorld()
    stale = world.make([[1]])
    stale.route.engine_epoch -= 1
    world.post(stale)
    rid = world.submit([[1] * 60, [1] * 60])
    world.turn()
    world.engine.peer_restarted(Kind.FRONTEND, 0, 2)
    world.post(world.make([[1]]))
    world.run()
    assert world.dropped("misrouted") == 1 and world.dropped("frontend_gone") == 1
    assert len(world.rows(rid)) == 1, "what was computed before its frontend died"
    newer = world.submit([[1]], rid=RidMaker(0, 2).next())
    world.run()
    assert len(world.rows(newer)) == 1
    with pytest.raises(BadFrame):
        world.engine.handle(StopHit(1, 2))


def test_the_census_names_what_is_held() -> None:
    world = PoolWorld()
    held = world.submit([[1] * 60 for _ in range(4)])
    done = world.submit([[1]])
    world.turn(2)
    world.now = world.engine.next_timer_ns() or 0
    world.turn()
    assert world.peers[0].census == {held} and done not in world.peers[0].census
    world.run()


def test_random_interleavings_end_each_request_exactly_once(depth: int) -> None:
    generator = random.Random(7)
    world = PoolWorld(depth=depth, null_script="nan_id=13;raise_id=17", max_waiting=30)
    wanted: dict[int, int] = {}
    aborted: set[int] = set()
    pending: list[tuple[int, int, int]] = []                  # (rid, start, total) of slices to come
    for _ in range(1500):
        choice = generator.random()
        world.now += generator.choice([0, 10**6, 10**8])
        if choice < 0.25:
            total, first = generator.randint(1, 9), generator.randint(1, 3)
            first = min(first, total)
            rid = world.submit([[generator.randrange(400) for _ in range(generator.randint(1, 30))]
                                for _ in range(first)], total=total, frontend=generator.randrange(2))
            wanted[rid] = total
            if first < total:
                pending.append((rid, first, total))
        elif choice < 0.5 and pending:
            rid, start, total = pending.pop(generator.randrange(len(pending)))
            world.post(world.make([[generator.randrange(400)] * generator.randint(1, 40) for _ in range(total - start)],
                                  rid=rid, start=start, total=total))
        elif choice < 0.55 and wanted:
            rid = generator.choice(list(wanted))
            aborted.add(rid)
            world.abort(rid)
        else:
            world.turn()
    for rid, start, total in pending:
        world.post(world.make([[1]] * (total - start), rid=rid, start=start, total=total))
    world.run()
    for rid, total in wanted.items():
        assert rid in aborted or (world.failure(rid) is None) == (len(world.rows(rid)) == total), rid
    assert sum(world.failure(rid) is None for rid in wanted) > len(wanted) // 2


# ---- inputs in parts ---------------------------------------------------------------------------------------------

def test_an_input_in_parts_is_the_mean_of_its_parts_by_their_tokens(depth: int) -> None:
    ids, sizes = [random.Random(5).randrange(1000) for _ in range(150)], [64, 64, 22]
    world = PoolWorld(depth=depth, max_embed_len=200)
    rid = world.submit([ids, [7, 8]], parts=[sizes, []], dimensions=8)
    world.run()
    alone = PoolWorld()
    each = [alone.submit([ids[start:start + size]], activation=False) for start, size in ((0, 64), (64, 64), (128, 22))]
    alone.run()
    mean = sum(alone.rows(one)[0][0] * size for one, size in zip(each, sizes))[:8] / 150
    assert np.abs(world.rows(rid)[0][0] - mean / np.linalg.norm(mean)).max() < 1e-5
    assert world.peers[0].lengths[rid] == {0: 150, 1: 2}
    assert world.rows(rid)[1].shape == (1, 8)


def test_parts_that_cannot_be_are_refused() -> None:
    world = PoolWorld(max_embed_len=100)
    for ids, sizes, task in (([1] * 90, [64, 25], "embed"), ([1] * 90, [65, 25], "embed"), ([1] * 110, [60, 50], "embed"),
                             ([1] * 9, [9, 0], "embed"), ([1] * 90, [45, 45], "token_embed")):
        rid = world.submit([ids], parts=[sizes], task=task)
        world.run()
        assert world.peers[0].failed[rid] in ("invalid_value", "context_length_exceeded"), (sizes, task)


def test_a_part_that_fails_ends_its_request_once() -> None:
    world = PoolWorld(max_embed_len=200, null_script="nan_id=9")
    rid, other = world.submit([[1] * 64 + [9] * 5], parts=[[64, 5]]), world.submit([[1, 2]])
    world.run()
    assert world.peers[0].failed == {rid: "numerical_error"} and len(world.rows(other)) == 1
