"""What the scheduler decides: budgets, chunks, sharing, pre-emption, order, and that a text depends on nothing else."""
from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from engine_proc.blocks import BlockPool
from engine_proc.plan import StepPlan
from engine_proc.request import Sequence
from engine_proc.scheduler import Scheduler
from pipeline.errors import QuartetError
from pipeline.messages import Finish
from tests.engine_proc.harness import EOS, KvRunner, alone, engine_config, make_seq


class Bench:
    """A scheduler and a checking runner, driven as the engine's loop does."""

    def __init__(self, depth: int = 0, **config: Any) -> None:
        self.config = engine_config(**config)
        self.runner = KvRunner(self.config, depth)
        self.pool = BlockPool(self.config.num_kv_blocks or 0, self.config.block_size, self.config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, self.pool, self.runner.admit, self.runner.release)
        self.in_flight: deque[tuple[StepPlan, object]] = deque()
        self.ended: list[Sequence] = []

    def add(self, *seqs: Sequence) -> None:
        for seq in seqs:
            seq.max_total = min(seq.max_total, self.pool.capacity + 1)
            self.scheduler.add(seq)

    def turn(self) -> StepPlan | None:
        """One turn of the loop; the plan that was launched."""
        self.ended += self.scheduler.reap()
        plan = self.scheduler.plan()
        self.check()
        if plan is not None:
            self.in_flight.append((plan, self.runner.launch(plan)))
        if self.in_flight and (len(self.in_flight) > self.runner.depth or plan is None):
            oldest, handle = self.in_flight.popleft()
            self.ended += [seq for seq, _ in self.scheduler.collect(oldest, self.runner.collect(handle)) if seq.finish]
        self.check()
        return plan

    def check(self) -> None:
        dying = {id(i.seq): i.seq for plan, _ in self.in_flight for i in plan.items if i.seq.finish}
        self.scheduler.assert_invariants(list(dying.values()))

    def until(self, reached: Callable[[], object], limit: int = 200) -> None:
        """Turn until `reached()`."""
        for _ in range(limit):
            if reached():
                return
            self.turn()
        raise AssertionError("never reached")

    def run(self, limit: int = 2000) -> None:
        """Turn until nothing is left, and nothing is held."""
        for _ in range(limit):
            waiting_for_a_step = bool(self.in_flight)
            if self.turn() is None and not waiting_for_a_step and not self.scheduler.marked:
                break
        scheduler = self.scheduler
        assert not scheduler.running and not scheduler.num_waiting and not scheduler.num_dying, "not finished"
        assert self.pool.num_used == 0 and not self.runner.slots


def shape(plan: StepPlan | None) -> list[tuple[int, int, int]]:
    return [(item.seq.rid, item.start, item.count) for item in plan.items] if plan else []


def outputs(seq: Sequence) -> tuple[list[int], Finish]:
    return list(seq.tokens[seq.num_prompt:]), seq.finish


@pytest.fixture(params=[0, 1], ids=["synchronous", "one ahead"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ---- the token budget --------------------------------------------------------------------------------------------

def test_a_prompt_is_computed_in_chunks_and_then_token_by_token() -> None:
    bench = Bench(max_step_tokens=16, max_prefill_chunk=8)
    bench.add(make_seq(1, range(20), max_tokens=3))
    assert [shape(bench.turn()) for _ in range(6)] == [
        [(1, 0, 8)], [(1, 8, 8)], [(1, 16, 4)], [(1, 20, 1)], [(1, 21, 1)], []]
    assert bench.ended[0].num_output == 3 and bench.ended[0].finish is Finish.LENGTH


def test_running_sequences_decode_ahead_of_prompts_within_the_budget() -> None:
    bench = Bench(max_step_tokens=10, max_prefill_chunk=8)
    bench.add(make_seq(1, range(4), max_tokens=9), make_seq(2, range(50, 54), max_tokens=9))
    assert shape(bench.turn()) == [(1, 0, 4), (2, 0, 4)]
    bench.add(make_seq(3, range(60, 80), max_tokens=9), make_seq(4, range(20, 40), max_tokens=9))
    assert shape(bench.turn()) == [(1, 4, 1), (2, 4, 1), (3, 0, 8)]
    assert shape(bench.turn()) == [(1, 5, 1), (2, 5, 1), (3, 8, 8)]
    assert shape(bench.turn()) == [(1, 6, 1), (2, 6, 1), (3, 16, 4), (4, 0, 4)]


def test_a_prompt_takes_no_more_than_its_cap_so_that_others_start_beside_it() -> None:
    bench = Bench(max_step_tokens=16, max_prefill_chunk=6)
    bench.add(make_seq(1, range(20)), make_seq(2, range(40, 60)))
    assert shape(bench.turn()) == [(1, 0, 6), (2, 0, 6)]


def test_prompts_hold_up_decoding_sequences_for_few_tokens_at_a_time() -> None:
    bench = Bench(max_step_tokens=16, max_prefill_chunk=8, max_mixed_prefill=5)
    bench.add(make_seq(1, range(8), max_tokens=9))
    assert shape(bench.turn()) == [(1, 0, 8)]                       # alone: as much as there is
    bench.add(make_seq(2, range(20, 28), max_tokens=1), make_seq(3, range(40, 44), max_tokens=1))
    assert shape(bench.turn()) == [(1, 8, 1), (2, 0, 5)]
    assert shape(bench.turn()) == [(1, 9, 1), (2, 5, 3), (3, 0, 2)]
    assert shape(bench.turn()) == [(1, 10, 1), (3, 2, 2)]


def test_prompt_tokens_with_a_long_context_count_for_more_beside_decoding_sequences() -> None:
    bench = Bench(max_step_tokens=64, max_prefill_chunk=64, max_mixed_prefill=12)
    bench.scheduler.context_cost = 1 / 8
    bench.add(make_seq(1, range(8), max_tokens=20))
    assert shape(bench.turn()) == [(1, 0, 8)]
    bench.add(make_seq(2, range(20, 60), max_tokens=1))
    assert shape(bench.turn()) == [(1, 8, 1), (2, 0, 12)]
    assert shape(bench.turn()) == [(1, 9, 1), (2, 12, 4)]            # 2.5 each
    assert shape(bench.turn()) == [(1, 10, 1), (2, 16, 4)]           # 3 each
    assert [shape(bench.turn())[1] for _ in range(6)] == [(2, at, 3) for at in range(20, 38, 3)]    # never less
    bench.add(make_seq(3, range(80, 90), max_tokens=1))
    assert shape(bench.turn()) == [(1, 17, 1), (2, 38, 2)]           # 5.75 each: half of one is left
    assert shape(bench.turn()) == [(1, 18, 1), (3, 0, 10)]
    bench.run()


def test_a_prompt_goes_on_beside_decoding_sequences_however_dear_its_tokens_are() -> None:
    bench = Bench(max_mixed_prefill=1)
    bench.scheduler.context_cost = 3.0
    bench.add(make_seq(1, range(8), max_tokens=20))
    bench.turn()
    bench.add(make_seq(2, range(20, 26), max_tokens=1))
    assert [shape(bench.turn()) for _ in range(6)] == [[(1, 8 + i, 1), (2, i, 1)] for i in range(6)]


def test_without_decoding_sequences_a_context_costs_nothing() -> None:
    bench = Bench(max_step_tokens=16, max_prefill_chunk=16, max_mixed_prefill=4)
    bench.scheduler.context_cost = 1.0
    bench.add(make_seq(1, range(40), max_tokens=1))
    assert [shape(bench.turn()) for _ in range(3)] == [[(1, 0, 16)], [(1, 16, 16)], [(1, 32, 8)]]


def test_no_more_sequences_run_than_allowed() -> None:
    bench = Bench(max_num_seqs=2)
    bench.add(*[make_seq(rid, [rid, 5], max_tokens=2) for rid in range(1, 6)])
    bench.turn()
    assert [seq.rid for seq in bench.scheduler.running] == [1, 2] and bench.scheduler.num_waiting == 3
    bench.run()
    assert [seq.rid for seq in bench.ended] == [1, 2, 3, 4, 5]


def test_a_plan_samples_only_where_a_token_follows() -> None:
    bench = Bench()
    bench.add(make_seq(1, range(10), max_tokens=2))
    samples = []
    while plan := bench.turn():
        samples += [item.sample for item in plan.items]
    assert samples == [False, True, True]


def test_steps_ahead_never_pass_the_length_limit() -> None:
    bench = Bench(depth=1)
    bench.add(make_seq(1, range(4), max_tokens=3))
    bench.run()
    assert [shape(plan) for plan in bench.runner.plans] == [[(1, 0, 4)], [(1, 4, 1)], [(1, 5, 1)]]


# ---- order -------------------------------------------------------------------------------------------------------

def test_priority_goes_ahead_of_arrival_only_where_asked_for() -> None:
    for policy, expected in (("fcfs", [1, 2, 3]), ("priority", [3, 1, 2])):
        bench = Bench(max_num_seqs=1, scheduling_policy=policy)
        bench.add(make_seq(1, [5]), make_seq(2, [6], priority=4), make_seq(3, [7], priority=-1))
        bench.run()
        assert [seq.rid for seq in bench.ended] == expected


def test_a_stalled_detokenizer_keeps_only_its_own_prompts_waiting() -> None:
    bench = Bench()
    held, free = make_seq(1, [5], max_tokens=1), make_seq(2, [6], max_tokens=1)
    held.route = type(held.route)(0, 1, 0, 1, 7, 1)
    bench.add(held, free)
    bench.scheduler.stalled = frozenset({7})
    assert shape(bench.turn()) == [(2, 0, 1)] and bench.turn() is None
    bench.scheduler.stalled = frozenset()
    assert shape(bench.turn()) == [(1, 0, 1)]


def test_an_alone_sequence_has_no_neighbour(depth: int) -> None:
    bench = Bench(depth)
    bench.add(make_seq(1, [5, 6], max_tokens=6), make_seq(2, [7, 8], max_tokens=6, alone=True),
              make_seq(3, [9, 10], max_tokens=6))
    bench.run()
    for plan in bench.runner.plans:
        rids = {item.seq.rid for item in plan.items}
        assert 2 not in rids or rids == {2}
    assert [seq.rid for seq in bench.ended] == [1, 2, 3]


def test_an_alone_sequence_waits_for_the_surplus_step_of_one_that_ended() -> None:
    """The engine may die of either: only the one in the step is to be blamed."""
    bench = Bench(depth=1)
    first, last = make_seq(1, [5, 6], max_tokens=9), make_seq(2, [7, 8], max_tokens=2, alone=True)
    first.stops = frozenset(alone(first)[0][1:2])
    bench.add(first, last)
    bench.until(lambda: first.finish)
    assert first.num_in_flight == 1 and shape(bench.turn()) == []
    assert shape(bench.turn()) == [(2, 0, 2)]
    bench.run()


# ---- the prefix cache --------------------------------------------------------------------------------------------

def test_a_second_equal_prompt_computes_only_its_last_block() -> None:
    bench = Bench()
    bench.add(make_seq(1, range(16), max_tokens=1))
    bench.run()
    again = make_seq(2, range(16), max_tokens=1)
    bench.add(again)
    assert shape(bench.turn()) == [(2, 12, 4)]
    assert again.num_cached == 12
    assert (bench.scheduler.cache_queries, bench.scheduler.cache_hits) == (32, 12)


def test_nothing_is_shared_before_it_is_computed(depth: int) -> None:
    bench = Bench(depth, max_step_tokens=8, max_prefill_chunk=4)
    bench.add(make_seq(1, range(16), max_tokens=2), make_seq(2, range(16), max_tokens=2))
    bench.run()
    assert bench.ended[0].tokens == bench.ended[1].tokens


def test_output_becomes_a_prefix_for_the_next_turn_of_a_conversation() -> None:
    bench = Bench()
    first = make_seq(1, range(8), max_tokens=9)
    bench.add(first)
    bench.run()
    following = make_seq(2, [*first.tokens, 1, 2, 3], max_tokens=1)
    bench.add(following)
    bench.turn()
    assert following.num_cached == 16


def test_salts_do_not_share() -> None:
    bench = Bench()
    bench.add(make_seq(1, range(16), max_tokens=1, salt=b"a"))
    bench.run()
    other = make_seq(2, range(16), max_tokens=1, salt=b"b")
    bench.add(other)
    bench.turn()
    assert other.num_cached == 0


def test_prompt_logprobs_are_computed_for_every_position_once() -> None:
    bench = Bench(max_prefill_chunk=8)
    bench.add(make_seq(1, range(20), max_tokens=1))
    bench.run()
    seq = make_seq(2, range(20), max_tokens=4, prompt_logprobs=0)
    bench.add(seq)
    bench.turn()
    bench.turn()
    bench.scheduler.preempt(seq)
    bench.run()
    scored = [(i.start, i.count) for plan in bench.runner.plans for i in plan.items if i.prompt_logprobs]
    assert scored == [(0, 8), (8, 8), (16, 4)]
    assert sum(len(piece.values) // 4 for piece in seq.prompt_logprobs) == 19


# ---- siblings ----------------------------------------------------------------------------------------------------

def family(count: int, prompt: range, **values: Any) -> list[Sequence]:
    seqs = [make_seq(256, prompt, j=j, **values) for j in range(count)]
    for seq in seqs[1:]:
        seq.leader = seqs[0]
    return seqs


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_compute_their_prompt_once_and_copy_its_last_block(caching: bool, depth: int) -> None:
    bench = Bench(depth, enable_prefix_caching=caching)
    seqs = family(3, range(10), max_tokens=5)
    bench.add(*seqs)
    bench.run()
    prompt_work = [(i.seq.rid, i.start, i.count) for p in bench.runner.plans for i in p.items if i.start < 10]
    assert prompt_work == [(256, 0, 8), (256, 8, 2), (257, 9, 1), (258, 9, 1)]
    assert [len(p.copies) for p in bench.runner.plans if p.copies] == [2]
    assert [outputs(seq) for seq in seqs] == [alone(seq) for seq in seqs]
    assert len({tuple(seq.tokens) for seq in seqs}) == 3, "choices differ"


def test_siblings_whose_leader_ended_go_on_with_a_new_one() -> None:
    bench = Bench()
    seqs = family(3, range(10), max_tokens=3)
    bench.add(*seqs)
    bench.turn()
    bench.scheduler.mark(seqs[0], Finish.ABORT)
    bench.run()
    assert [outputs(seq) for seq in seqs[1:]] == [alone(seq) for seq in seqs[1:]]
    starts = [(i.seq.rid, i.start) for p in bench.runner.plans for i in p.items if i.start < 10]
    assert starts == [(256, 0), (257, 8), (258, 9)], "the leader's first blocks were computed already"


def test_a_family_can_be_aborted_while_it_waits() -> None:
    bench = Bench(max_num_seqs=1)
    first, seqs = make_seq(1, [5], max_tokens=4), family(4, range(6))
    bench.add(first, *seqs)
    bench.turn()
    for seq in seqs:
        bench.scheduler.mark(seq, Finish.ABORT)
    bench.run()
    assert {seq.rid for seq in bench.ended} == {1, 256, 257, 258, 259}
    assert all(seq.finish is Finish.ABORT for seq in seqs)


# ---- pre-emption -------------------------------------------------------------------------------------------------

def test_when_blocks_run_out_the_newest_goes_and_later_ends_with_the_same_text(depth: int) -> None:
    bench = Bench(depth, num_kv_blocks=8, enable_prefix_caching=False)
    seqs = [make_seq(rid, range(rid, rid + 6), max_tokens=14, ignore_eos=True) for rid in (1, 2, 3)]
    bench.add(*seqs)
    bench.run()
    assert bench.scheduler.num_preemptions >= 1 and seqs[0].preemptions == 0
    assert [outputs(seq) for seq in seqs] == [alone(seq) for seq in seqs]


def test_the_lowest_priority_is_preempted_first() -> None:
    bench = Bench(num_kv_blocks=8, scheduling_policy="priority")
    urgent = make_seq(2, range(6), max_tokens=16, priority=-1, ignore_eos=True)
    usual = make_seq(1, range(9, 15), max_tokens=16, ignore_eos=True)
    bench.add(usual, urgent)
    bench.run()
    assert urgent.preemptions == 0 and usual.preemptions >= 1
    assert [seq.rid for seq in bench.ended] == [2, 1]


def test_a_prompt_waits_while_the_running_ones_may_need_its_blocks_next() -> None:
    bench = Bench(num_kv_blocks=5)
    running, waiting = make_seq(1, range(2), max_tokens=6, ignore_eos=True), make_seq(2, range(50, 61), max_tokens=1)
    bench.add(running)
    bench.turn()
    bench.add(waiting)
    assert shape(bench.turn()) == [(1, 2, 1)] and bench.pool.num_free == 3, "it needs three, and one is kept"
    bench.run()
    assert waiting.preemptions == 0 and outputs(waiting) == alone(waiting)


def test_one_step_ahead_the_newer_pause_so_that_an_older_one_gets_its_block() -> None:
    bench = Bench(depth=1, num_kv_blocks=6, enable_prefix_caching=False)
    older, newer = (make_seq(1, range(6), max_tokens=11, ignore_eos=True),
                    make_seq(2, range(9, 17), max_tokens=11, ignore_eos=True))
    bench.add(older, newer)
    bench.until(lambda: newer.preemptions)
    assert older.num_computed == 8 and len(newer.tokens) == 11, "it did not run on to the end of its own block"
    bench.run()
    assert [outputs(seq) for seq in (older, newer)] == [alone(seq) for seq in (older, newer)]


def test_a_sequence_that_fills_the_whole_pool_ends_by_length(depth: int) -> None:
    bench = Bench(depth, num_kv_blocks=4)
    seq = make_seq(1, range(5), max_tokens=1000, ignore_eos=True)
    bench.add(seq)
    bench.run()
    assert seq.finish is Finish.LENGTH and len(seq.tokens) == bench.pool.capacity + 1


# ---- endings -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("output", "values", "finish", "stop_id"), [
    ([9, EOS], {}, Finish.EOS, None),
    ([9, EOS], {"ignore_eos": True}, Finish.RUNNING, None),
    ([9, EOS], {"ignore_eos": True, "stop_ids": [EOS]}, Finish.STOP_ID, EOS),
    ([9, 7], {"stop_ids": [7]}, Finish.STOP_ID, 7),
    ([9, 7], {"stop_ids": [7], "min_tokens": 2}, Finish.RUNNING, None),
    ([9, 7], {"stop_ids": [7], "min_tokens": 1}, Finish.STOP_ID, 7),
    ([9, 7], {"stop_ids": [7], "max_tokens": 2}, Finish.STOP_ID, 7),
    ([9, 8], {"stop_ids": [7], "max_tokens": 2}, Finish.LENGTH, None),
])
def test_the_newest_id_decides(output: list[int], values: dict[str, Any], finish: Finish, stop_id: int | None) -> None:
    seq = make_seq(1, [3, 4], **values)
    seq.tokens.extend(output)
    assert (seq.verdict(), seq.stop_id) == (finish, stop_id)


def test_a_mark_on_a_waiting_sequence_acts_at_once() -> None:
    bench = Bench(max_num_seqs=1)
    running, waiting = make_seq(1, [5], max_tokens=4), make_seq(2, [6])
    bench.add(running, waiting)
    bench.turn()
    bench.scheduler.mark(waiting, Finish.ABORT)
    assert bench.scheduler.reap() == [waiting] and bench.scheduler.num_waiting == 0


def test_what_a_step_in_flight_holds_is_freed_only_when_it_is_collected() -> None:
    bench = Bench(depth=1)
    seq = make_seq(1, [5, 6], max_tokens=9, ignore_eos=True)
    bench.add(seq)
    bench.turn()
    bench.turn()
    bench.scheduler.mark(seq, Finish.ABORT)
    assert bench.scheduler.reap() == [] and not seq.finish
    bench.turn()
    assert seq.finish is Finish.ABORT
    bench.run()


def test_tokens_after_the_end_are_dropped() -> None:
    bench = Bench(depth=1)
    seq = make_seq(1, [5, 6], max_tokens=9)
    seq.stops = frozenset({alone(seq)[0][1]})         # its second id
    expected = alone(seq)
    bench.add(seq)
    bench.run()
    assert outputs(seq) == expected and seq.num_output <= 9 and seq.finish is not Finish.LENGTH


def test_a_deadline_comes_after_the_rules_of_the_text() -> None:
    error = QuartetError("timeout", "The request took longer than its deadline.")
    for max_tokens, expected in ((1, Finish.LENGTH), (5, Finish.ERROR)):
        bench = Bench()
        seq = make_seq(1, [5, 6], max_tokens=max_tokens)
        bench.add(seq)
        plan = bench.scheduler.plan()
        assert plan is not None
        bench.scheduler.mark(seq, Finish.ERROR, error)
        bench.scheduler.collect(plan, bench.runner.collect(bench.runner.launch(plan)))
        assert seq.finish is expected and seq.num_output == 1


def test_an_item_s_error_ends_that_sequence_only() -> None:
    bench = Bench()
    good, bad = make_seq(1, [5, 6], max_tokens=4), make_seq(2, [7, 8], max_tokens=4)
    bench.runner.errors[2] = "numerical_error"
    bench.add(good, bad)
    bench.run()
    assert bad.finish is Finish.ERROR and bad.error is not None and bad.error.code == "numerical_error"
    assert outputs(good) == alone(good)


def test_a_sequence_that_the_runner_refuses_ends_alone() -> None:
    bench = Bench()
    good, bad = make_seq(2, [5, 6], max_tokens=4), make_seq(1, [7, 8], max_tokens=4)
    bench.runner.refuse[1] = QuartetError("invalid_value", "No.", "logit_bias")
    bench.add(bad, good)
    bench.run()
    assert bad.finish is Finish.ERROR and bad.error is bench.runner.refuse[1]
    assert outputs(good) == alone(good)


def test_a_failed_step_gives_its_leases_back() -> None:
    bench = Bench()
    seq = make_seq(1, range(6), max_tokens=4)
    bench.add(seq)
    plan = bench.scheduler.plan()
    assert plan is not None and bench.scheduler.abandon(plan) == [seq]
    bench.scheduler.preempt(seq)
    bench.run()
    assert outputs(seq) == alone(seq)


def test_max_tokens_zero_computes_the_prompt_and_adds_nothing() -> None:
    bench = Bench()
    seq = make_seq(1, range(10), max_tokens=0, prompt_logprobs=2)
    bench.add(seq)
    bench.run()
    assert outputs(seq) == ([], Finish.LENGTH)
    assert not any(item.sample for plan in bench.runner.plans for item in plan.items)


# ---- everything at once ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(40))
def test_a_text_never_depends_on_neighbours_chunks_cache_or_preemption(seed: int, depth: int) -> None:
    """Random arrivals, families, aborts and tiny pools: all that was not aborted equals the sequence computed alone."""
    rng = random.Random(seed)
    bench = Bench(
        depth, num_kv_blocks=rng.randint(9, 30), max_num_seqs=rng.randint(1, 6), max_step_tokens=rng.randint(6, 24),
        max_prefill_chunk=rng.randint(1, 16), enable_prefix_caching=rng.random() < 0.7,
        scheduling_policy=rng.choice(["fcfs", "priority"]))
    seqs: list[Sequence] = []
    for number in range(24):
        common = list(range(rng.choice([0, 4, 9])))
        prompt = common + [rng.randrange(97) for _ in range(rng.randint(1, 12))]
        stops = [rng.randrange(97) for _ in range(rng.choice([0, 8]))]
        group = [make_seq(number << 8, prompt, j=j, stop_ids=stops, max_tokens=rng.randint(1, 12), seed=seed,
                          priority=rng.randint(-1, 1), alone=rng.random() < 0.05, salt=bytes([rng.randrange(2)]))
                 for j in range(rng.choice([1, 1, 1, 3]))]
        for seq in group[1:]:
            seq.leader = group[0]
        bench.add(*group)
        seqs += group
        for _ in range(rng.randint(0, 3)):
            bench.turn()
        if rng.random() < 0.3:
            bench.scheduler.mark(rng.choice(seqs), Finish.ABORT)
    bench.run()
    assert sorted(seq.rid for seq in bench.ended) == sorted(seq.rid for seq in seqs), "each ends once"
    for seq in seqs:
        ids, finish = alone(seq)
        if seq.finish is Finish.ABORT:
            assert outputs(seq)[0] == ids[:seq.num_output]
        else:
            assert outputs(seq) == (ids, finish)
