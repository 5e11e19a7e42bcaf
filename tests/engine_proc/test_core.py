"""The engine's loop as its peers see it: what is admitted, what is answered, how everything ends."""
from __future__ import annotations

import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from engine_proc.admission import TOMBSTONE_NS, Tombstones
from pipeline.errors import QuartetError
from pipeline.ids import RidMaker
from pipeline.messages import Deltas, Finish, Kind, Route, StopHit, unpack_ids
from pipeline.params import DetokSpec
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.engine_proc.harness import EOS, VOCAB
from tests.engine_proc.world import EPOCH, World

DETOK, FRONTEND = Address(Kind.DETOKENIZER, 0), Address(Kind.FRONTEND, 0)


@pytest.fixture(params=[0, 1], ids=["synchronous", "one ahead"])
def depth(request: pytest.FixtureRequest) -> int:
    return int(request.param)


# ---- one request -------------------------------------------------------------------------------------------------

def test_a_request_is_admitted_opened_answered_and_closed(depth: int) -> None:
    world = World(depth)
    rid = world.submit(range(20, 32), max_tokens=5, ignore_eos=True)
    world.run()
    entry = world.outcome(rid)
    assert unpack_ids(world.frontends[0].admitted[rid]).tolist() == list(range(20, 32))
    assert unpack_ids(entry.opened.left).tolist() == list(range(24, 32)), "the last eight prompt ids"
    assert entry.output == world.expected(rid)
    assert [len(record.ids) // 4 for record in entry.records] == [1] * 5
    assert [record.usage is not None for record in entry.records] == [True, False, False, False, True]
    assert entry.usage is not None and (entry.usage.prompt_tokens, entry.usage.completion_tokens) == (12, 5)


def test_usage_tells_the_prompt_tokens_that_were_cached() -> None:
    world = World()
    world.submit(range(20, 32), max_tokens=1)
    world.run()
    again = world.submit(range(20, 32), max_tokens=1)
    world.run()
    usage = world.outcome(again).usage
    assert usage is not None and usage.cached_tokens == 8


def test_each_choice_of_a_family_has_an_entry_of_its_own(depth: int) -> None:
    world = World(depth)
    rid = world.submit(range(10), n=3, max_tokens=6)
    world.run()
    assert list(world.frontends[0].admitted) == [rid]
    for j in range(3):
        assert world.output(rid + j) == world.expected(rid, j)


def test_choices_are_numbered_from_the_first_one() -> None:
    world = World()
    whole = world.submit(range(10), n=3)
    third = world.submit(range(10), choice=2)
    world.run()
    assert world.output(third) == world.output(whole + 2)


def test_logprobs_ride_with_their_tokens() -> None:
    world = World()
    rid = world.submit([7, 8], max_tokens=3, logprobs=2)
    world.run()
    for record in world.outcome(rid).records:
        assert record.logprobs is not None and record.logprobs.k == 2
        assert len(record.logprobs.values) == 4 and len(record.logprobs.top_ids) == 8
        assert record.logprobs.top_ids[:4] == record.ids


def test_prompt_logprobs_come_once_and_whole_with_the_first_token() -> None:
    world = World(max_prefill_chunk=4)
    rid = world.submit(range(20, 31), max_tokens=2, prompt_logprobs=1)
    world.run()
    first, second = world.outcome(rid).records
    assert second.prompt_logprobs is None and first.prompt_logprobs is not None
    values = np.frombuffer(first.prompt_logprobs.values, np.float32)
    assert len(values) == 11 and np.isnan(values[0]) and np.isfinite(values[1:]).all()
    assert unpack_ids(first.prompt_logprobs.top_ids).tolist() == [0, *range(21, 31)]
    assert unpack_ids(world.outcome(rid).opened.left).tolist() == list(range(20, 31)), "the detokenizer names them"


def test_echo_gives_the_detokenizer_the_whole_prompt() -> None:
    world = World()
    rid = world.submit(range(20, 40), spec=DetokSpec(echo=True), max_tokens=1)
    world.run()
    assert unpack_ids(world.outcome(rid).opened.left).tolist() == list(range(20, 40))


@pytest.mark.parametrize(("prompt", "scored"), [([9], 0), ([9], None), (range(20), None), (range(20), 3)])
def test_max_tokens_zero_answers_with_the_prompt_only(prompt: Any, scored: int | None) -> None:
    world = World()
    rid = world.submit(prompt, max_tokens=0, prompt_logprobs=scored, n=2, detok=1)
    world.run()
    for child in (rid, rid + 1):
        assert world.output(child) == ([], Finish.LENGTH)
        [record] = world.outcome(child).records
        assert (record.prompt_logprobs is None) == (scored is None)
    assert bool(world.runner.plans) == (scored is not None and len(prompt) > 1)


# ---- how a text ends ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("script", "sampling", "expected"), [
    ("hash;eos_after=2", {}, ([..., ..., EOS], Finish.EOS, None)),
    ("echo", {}, ([10, 11, 5], Finish.STOP_ID, 5)),                                # 5: the model's second end id
    ("echo", {"stop_ids": [11]}, ([10, 11], Finish.STOP_ID, 11)),
    ("echo", {"stop_ids": [11], "min_tokens": 4}, ([10, 12, 6, 10, 11], Finish.STOP_ID, 11)),
    ("echo", {"ignore_eos": True, "max_tokens": 4}, ([10, 11, 5, 10], Finish.LENGTH, None)),
    ("echo", {"ignore_eos": True, "stop_ids": [5]}, ([10, 11, 5], Finish.STOP_ID, 5)),
    ("count", {"max_tokens": 3}, ([6, 7, 8], Finish.LENGTH, None)),
])
def test_the_rules_of_a_text_s_end(script: str, sampling: dict[str, Any], expected: Any) -> None:
    world = World(null_script=script)
    rid = world.submit([10, 11, 5], **sampling)
    world.run()
    ids, finish, stop_id = expected
    got = world.outcome(rid)
    assert (len(got.ids), got.finish, got.stop_id) == (len(ids), finish, stop_id)
    assert all(want in (..., have) for want, have in zip(ids, got.ids))


def test_the_context_length_ends_a_text(depth: int) -> None:
    world = World(depth, max_model_len=20)
    rid = world.submit(range(30, 45), max_tokens=1000, ignore_eos=True)
    world.run()
    ids, finish = world.output(rid)
    assert (len(ids), finish) == (5, Finish.LENGTH)


def test_a_stop_string_ends_the_sequence_and_its_closing_record_is_empty(depth: int) -> None:
    world = World(depth)
    rid = world.submit(range(10), max_tokens=50, ignore_eos=True)
    world.turn(4 + depth)
    world.engine.handle(StopHit(rid, 3))
    world.run()
    entry = world.outcome(rid)
    assert entry.finish is Finish.STOP_STRING and entry.records[-1].ids == b""
    assert entry.usage is not None and entry.usage.completion_tokens == 3
    assert len(entry.ids) <= 4 + depth
    world.engine.handle(StopHit(rid, 3))
    assert world.dropped("unknown_stop") == 1


# ---- continuations -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", [1, 3, 7])
@pytest.mark.parametrize("script", ["hash", "hash;eos_after=9", "count"])
def test_a_continuation_gives_the_text_that_would_have_come(cut: int, script: str, depth: int) -> None:
    world = World(depth, null_script=script)
    sampling = {"max_tokens": 12, "min_tokens": 4, "seed": 7, "stop_ids": [40]}
    whole = world.submit(range(20, 33), choice=2, **sampling)
    world.run()
    ids, finish = world.output(whole)
    later = world.submit(range(20, 33), history=ids[:cut], choice=2, **sampling)
    world.run()
    entry = world.outcome(later)
    assert entry.output == (ids, finish)
    assert entry.records[0].start == cut and unpack_ids(entry.opened.history).tolist() == ids[:cut]
    assert entry.usage is not None and (entry.usage.prompt_tokens, entry.usage.completion_tokens) == (13, len(ids))
    assert entry.usage.cached_tokens <= 13


@pytest.mark.parametrize(("history", "expected"), [
    ([30, 31, 32], (Finish.LENGTH, None)), ([30, EOS], (Finish.EOS, None)), ([30, 5], (Finish.STOP_ID, 5))])
def test_a_continuation_of_a_finished_text_only_finishes(history: list[int], expected: Any) -> None:
    world = World()
    rid = world.submit([9], history=history, max_tokens=3)
    world.run()
    entry = world.outcome(rid)
    assert entry.ids == [] and (entry.finish, entry.stop_id) == expected
    assert world.runner.plans == []


def test_a_continuation_is_never_refused_for_load() -> None:
    world = World(max_waiting=1, max_num_seqs=1)
    first, second, refused = (world.submit([i]) for i in (7, 8, 9))
    kept = world.submit([10], history=[11])
    world.turn()
    assert world.failure(second) == "server_overloaded" == world.failure(refused)
    world.run()
    assert world.output(first) == world.expected(first) and world.output(kept) == world.expected(kept)


# ---- the door ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("prompt", "values", "code", "param"), [
    ([], {}, "invalid_value", "prompt"),
    ([1, VOCAB], {}, "invalid_value", "prompt"),
    ([1], {"history": [VOCAB + 4]}, "invalid_value", "prompt"),
    ([1], {"stop_ids": [VOCAB]}, "invalid_value", "stop_token_ids"),
    ([1], {"bias_ids": struct.pack("<I", VOCAB), "bias_values": bytes(4)}, "invalid_value", "logit_bias"),
    ([1], {"bias_ids": bytes(8), "bias_values": bytes(4)}, "invalid_value", "logit_bias"),
    ([1], {"bias_ids": bytes(4), "bias_values": struct.pack("<f", float("nan"))}, "invalid_value", "logit_bias"),
    ([1], {"temperature": float("inf")}, "invalid_value", "temperature"),
    ([1], {"logprobs": -1}, "invalid_value", "logprobs"),
    ([1], {"n": 200}, "invalid_value", "n"),
    ([1] * 64, {}, "context_length_exceeded", "prompt"),
    ([1] * 65, {"max_tokens": 0}, "context_length_exceeded", "prompt"),
])
def test_what_the_engine_refuses(prompt: list[int], values: dict[str, Any], code: str, param: str) -> None:
    world = World(max_model_len=64)
    rid = world.submit(prompt, **values)
    world.run()
    assert world.failure(rid) == code and not world.frontends[0].admitted
    assert world.metric("quartet:engine_refused_total") == 1
    fine = world.submit([1] * 63)
    world.run()
    assert world.output(fine) == world.expected(fine)


def test_ragged_ids_are_refused() -> None:
    world = World()
    add = world.make([1, 2])
    add.ids = add.ids[:-1]
    world.post(add)
    world.run()
    assert world.failure(add.rid) == "invalid_value"


def test_a_prompt_that_can_never_fit_is_refused_in_words() -> None:
    world = World(max_model_len=1000, num_kv_blocks=5)
    rid = world.submit([1] * 17)
    fits = world.submit([1] * 16)
    world.run()
    assert world.failure(rid) == "context_length_exceeded"
    assert world.frontends[0].messages[rid] == (
        "The prompt has 17 tokens, but the KV cache of this server holds 16 tokens.")
    assert world.output(fits)[1] is Finish.LENGTH and len(world.output(fits)[0]) == 1


@pytest.mark.parametrize("change", [
    {"engine": 1}, {"engine_epoch": EPOCH - 1}, {"engine_epoch": EPOCH + 1}, {"detok": 9}])
def test_what_is_meant_for_another_process_is_dropped_silently(change: dict[str, int]) -> None:
    world = World()
    route = Route(**{"tokenizer": 0, "tokenizer_epoch": 1, "engine": 0, "engine_epoch": EPOCH, "detok": 0,
                     "detok_epoch": 1, **change})
    rid = world.submit([1], route=route)
    world.run()
    assert world.dropped("misrouted") == 1
    assert rid not in world.frontends[0].admitted and rid not in world.frontends[0].failed


def test_a_message_that_no_engine_receives_is_a_bad_frame() -> None:
    with pytest.raises(BadFrame):
        World().engine.handle(Deltas(0, 1, []))


def test_a_repeated_add_is_ignored_while_it_runs_and_after_it_ended() -> None:
    world = World()
    rid, refused = world.submit([1, 2]), world.submit([])
    for _ in range(2):
        world.post(world.adds[rid])
        world.post(world.adds[refused])
        world.run()
    assert world.dropped("duplicate") == 4
    assert world.output(rid) == world.expected(rid) and world.failure(refused) == "invalid_value"


# ---- aborts and deadlines ----------------------------------------------------------------------------------------

def test_an_abort_may_overtake_its_request() -> None:
    world = World()
    add = world.make([1, 2])
    world.abort(add.rid)
    world.post(add)
    world.run()
    assert world.dropped("aborted") == 1 and add.rid not in world.frontends[0].admitted


def test_an_early_abort_of_one_choice_leaves_its_siblings() -> None:
    world = World()
    add = world.make(range(9), n=3)
    world.abort(add.rid + 1)
    world.post(add)
    world.run()
    assert set(world.detoks[0].closed) == {add.rid, add.rid + 2}


def test_tombstones_are_bounded_in_number_and_in_time() -> None:
    stones = Tombstones(3)
    for rid in range(5):
        stones.add(rid, 0)
    assert [rid for rid in range(5) if stones.holds(rid, 1)] == [2, 3, 4] and len(stones) == 3
    assert not stones.holds(4, TOMBSTONE_NS)
    stones.add(9, TOMBSTONE_NS)
    assert len(stones) == 1, "what expired is forgotten"


def test_an_abort_that_came_long_before_is_forgotten() -> None:
    world = World()
    add = world.make([1, 2])
    world.abort(add.rid)
    world.now += 121 * 10**9
    world.post(add)
    world.run()
    assert world.output(add.rid) == world.expected(add.rid)


def test_an_abort_of_a_family_covers_its_children(depth: int) -> None:
    world = World(depth)
    rid = world.submit(range(9), n=3, max_tokens=40, ignore_eos=True)
    world.turn(8)
    opened = set(world.detoks[0].open)
    assert opened
    world.abort(rid)
    world.run()
    assert {r: world.output(r)[1] for r in opened} == dict.fromkeys(opened, Finish.ABORT)
    assert world.metric("vllm:request_success_total", finished_reason="abort") == 3


def test_an_abort_of_a_child_is_of_that_child(depth: int) -> None:
    world = World(depth)
    rid = world.submit(range(9), n=3, max_tokens=20, ignore_eos=True)
    world.turn(8)
    world.abort(rid + 1)
    world.run()
    assert [world.output(rid + j)[1] for j in range(3)] == [Finish.LENGTH, Finish.ABORT, Finish.LENGTH]


def test_an_abort_takes_effect_within_one_step() -> None:
    world = World()
    rid = world.submit(range(9), max_tokens=40, ignore_eos=True)
    world.turn(3)
    world.abort(rid)
    world.turn()
    assert world.output(rid)[1] is Finish.ABORT and world.engine.load().kv_used == 0


def test_what_never_began_needs_no_closing_record() -> None:
    world = World(max_num_seqs=1)
    world.submit(range(9), max_tokens=3)
    waiting = world.submit(range(9))
    world.turn()
    world.abort(waiting)
    world.run()
    assert waiting not in world.detoks[0].closed and world.failure(waiting) is None


def test_deadlines_end_what_runs_and_what_waits(depth: int) -> None:
    world = World(depth, max_num_seqs=1)
    running = world.submit(range(9), max_tokens=40, ignore_eos=True, deadline_ns=world.now + 5000)
    waiting = world.submit(range(9), deadline_ns=world.now + 7000)
    later = world.submit([3, 4], deadline_ns=world.now + 10**12)
    world.turn(4)
    assert world.engine.next_timer_ns() == world.now + 5000
    world.now += 8000
    world.run()
    assert world.failure(running) == "timeout" == world.failure(waiting)
    assert world.output(running)[1] is Finish.ERROR and waiting not in world.detoks[0].closed
    assert world.output(later) == world.expected(later)


# ---- peers that die ----------------------------------------------------------------------------------------------

def test_a_dead_frontend_s_work_is_dropped_and_the_others_notice_nothing(depth: int) -> None:
    world = World(depth)
    dead = [world.submit([1, 2, i], max_tokens=30, ignore_eos=True, frontend=0) for i in range(3)]
    other = world.submit([5, 6], frontend=1)
    late = world.make([1], frontend=0)
    world.engine.peer_restarted(Kind.FRONTEND, 0, 1)
    world.turn(4)
    world.engine.peer_restarted(Kind.FRONTEND, 0, 2)
    world.post(late)
    world.run()
    assert all(world.output(rid)[1] is Finish.ABORT for rid in dead if rid in world.detoks[0].closed)
    assert len(world.detoks[0].closed) == 4
    assert world.output(other) == world.expected(other)
    assert world.dropped("frontend_gone") == 1


def test_a_frontend_newer_than_its_beacon_is_served() -> None:
    world = World()
    world.engine.peer_restarted(Kind.FRONTEND, 0, 1)
    world.makers[0] = RidMaker(0, 2)
    rid = world.submit([1, 2])
    world.run()
    assert world.output(rid) == world.expected(rid)


def test_a_dead_detokenizer_s_choices_end_silently(depth: int) -> None:
    world = World(depth)
    lost = world.submit([1, 2], max_tokens=30, ignore_eos=True, detok=0)
    other = world.submit([5, 6], detok=1)
    late = world.make([7], detok=0)
    world.turn(4)
    world.detoks[0] = type(world.detoks[0])(epoch=2)
    world.engine.peer_restarted(Kind.DETOKENIZER, 0, 2)
    world.post(late)
    again = world.submit([1, 2], history=[9], detok=0)
    world.run()
    assert world.failure(lost) is None and world.dropped("detokenizer_gone") == 1
    assert world.output(other) == world.expected(other) and world.output(again) == world.expected(again)
    assert set(world.detoks[0].closed) == {again}


# ---- destinations that are slow ----------------------------------------------------------------------------------

def test_output_that_is_not_taken_is_merged_and_nothing_waits_for_it() -> None:
    world = World()
    rid = world.submit([1, 2], max_tokens=9, logprobs=1, ignore_eos=True)
    world.turn(3)
    world.refusing = {DETOK, FRONTEND}
    world.turn(20)
    assert not world.engine.sequences and world.engine.outputs
    assert world.engine.next_timer_ns() <= world.now + 5_000_000
    world.refusing.clear()
    world.turn()
    assert rid in world.detoks[0].open, "a refused destination is left alone for a while"
    world.now += 5_000_000
    world.turn()
    entry = world.outcome(rid)
    assert entry.output == world.expected(rid) and len(entry.records) == 4
    merged = entry.records[-1]
    assert merged.logprobs is not None and len(merged.logprobs.values) == len(merged.ids) == len(merged.logprobs.ranks)
    world.assert_empty()


def test_an_open_that_waits_stays_ahead_of_its_tokens() -> None:
    world = World()
    world.refusing = {DETOK}
    rid = world.submit([1, 2], max_tokens=5)
    world.turn(10)
    world.refusing.clear()
    world.now += 5_000_000
    world.run()
    [record] = world.outcome(rid).records
    assert world.output(rid) == world.expected(rid) and record.usage is not None


def test_under_pressure_no_new_prompt_starts_for_that_detokenizer() -> None:
    world = World()
    running = world.submit([1, 2], max_tokens=12, ignore_eos=True)
    world.turn(2)
    world.pressures[DETOK] = 0.5
    world.turn()
    held, other = world.submit([3, 4]), world.submit([5, 6], detok=1)
    world.turn(30)
    assert running in world.detoks[0].closed and other in world.detoks[1].closed
    assert held not in world.detoks[0].open and not world.engine.has_work(), "it does not spin"
    assert world.engine.next_timer_ns() <= world.now + 5_000_000
    world.pressures.clear()
    world.turn()
    world.run()
    assert world.output(held) == world.expected(held)


def test_a_stuck_detokenizer_s_choices_end_and_memory_stays_bounded() -> None:
    world = World(max_pending=300)
    stuck = world.submit([1, 2], max_tokens=60, ignore_eos=True, logprobs=5)
    other = world.submit([5, 6], detok=1, max_tokens=20)
    world.turn(3)
    world.refusing = {DETOK}
    for _ in range(30):
        world.now += 5_000_000
        world.turn()
    assert stuck not in world.engine.sequences and world.output(other) == world.expected(other)
    assert world.metric("quartet:engine_stuck_peers_total") == 1
    world.refusing.clear()
    world.now += 5_000_000
    world.run()
    assert world.outcome(stuck).finish is Finish.ABORT
    assert world.outcome(stuck).ids == world.expected(stuck)[0][:len(world.outcome(stuck).ids)]


def test_ids_that_a_detokenizer_refuses_are_merged_into_one_record_a_choice() -> None:
    world = World()
    first, second = (world.submit([n, 2], max_tokens=30, ignore_eos=True) for n in (1, 3))
    world.turn(5)
    sent = world.sent[DETOK]
    world.refusing = {DETOK}
    for _ in range(8):
        world.turn()                          # the clock stands: nobody tries again
    [waiting] = world.engine.outputs._detoks.values()
    assert not waiting.rows and {rid: len(out.ids) // 4 for rid, out in waiting.items.items()} == {first: 8, second: 8}
    world.refusing.clear()
    world.now += 5_000_000
    world.turn()
    assert world.sent[DETOK] == sent + 1
    world.run()
    assert [world.output(rid) for rid in (first, second)] == [world.expected(rid) for rid in (first, second)]


def test_nothing_is_opened_at_a_stuck_detokenizer() -> None:
    world = World(max_pending=300)
    world.refusing = {DETOK}
    for _ in range(40):
        world.submit([1], max_tokens=0)
        world.now += 5_000_000
        world.turn()
    waiting = next(iter(world.engine.outputs._detoks.values()))
    assert waiting.stuck and waiting.size < 600
    world.refusing.clear()
    world.now += 5_000_000
    world.run()
    later = world.submit([1], max_tokens=0)
    world.run()
    assert world.output(later) == ([], Finish.LENGTH)


def test_a_stuck_frontend_s_requests_end() -> None:
    world = World(max_pending=300)
    world.refusing = {FRONTEND}
    rids = [world.submit([1, i], max_tokens=3) for i in range(10)]
    world.turn(20)
    assert not world.engine.sequences and not world.frontends[0].admitted
    world.refusing.clear()
    world.now += 5_000_000
    later = world.submit([4, 5])
    world.run()
    assert world.output(later) == world.expected(later) and later in world.frontends[0].admitted
    assert not set(rids) & set(world.frontends[0].admitted)


def test_every_frontend_gets_a_census_also_an_empty_one() -> None:
    world = World()
    rid = world.submit(range(9), n=2, max_tokens=40, ignore_eos=True)
    world.turn(6)
    assert world.frontends[0].census is None
    world.now += int(world.config.timeouts.census_s * 1e9)
    world.turn()
    assert world.frontends[0].census == {rid, rid + 1} and world.frontends[1].census == set()


def test_a_census_holds_what_ended_but_was_not_taken() -> None:
    world = World()
    rid = world.submit([1, 2], max_tokens=4)
    world.refusing = {DETOK}
    world.turn(8)
    world.now += int(world.config.timeouts.census_s * 1e9)
    world.turn()
    assert not world.engine.sequences and world.frontends[0].census == {rid}


# ---- failures of the runner --------------------------------------------------------------------------------------

@pytest.mark.parametrize("where", ["launch_errors", "collect_errors"])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_a_step_that_fails_ends_what_it_held_and_nothing_else(where: str, step: int, depth: int) -> None:
    world = World(depth)
    setattr(world.runner, where, [None] * step + [RuntimeError("device lost")])
    rids = [world.submit([1, i], max_tokens=20, ignore_eos=True) for i in range(2)]
    world.run()
    assert [world.failure(rid) for rid in rids] == ["internal_error"] * 2
    assert all(world.output(rid)[1] is Finish.ERROR for rid in rids if rid in world.detoks[0].closed)
    later = world.submit([7, 8])
    world.run()
    assert world.output(later) == world.expected(later)
    assert world.metric("quartet:engine_step_errors_total") == 1


@pytest.mark.parametrize("where", ["launch_errors", "collect_errors"])
def test_out_of_memory_costs_the_newest_and_the_others_are_computed_again(where: str, depth: int) -> None:
    world = World(depth)
    rids = [world.submit([1, i], max_tokens=20, ignore_eos=True) for i in range(3)]
    setattr(world.runner, where, [None] * 5 + [MemoryError()])
    world.run()
    assert world.failure(rids[2]) == "out_of_memory"
    assert [world.output(rid) for rid in rids[:2]] == [world.expected(rid) for rid in rids[:2]]


def test_an_abort_that_meets_a_failed_step_still_ends_it() -> None:
    world = World(depth=1)
    rid = world.submit([1, 2], max_tokens=20, ignore_eos=True)
    world.runner.collect_errors = [None, MemoryError()]
    world.turn(2)
    world.abort(rid)
    world.run()
    assert rid not in world.engine.sequences


def test_three_failed_steps_in_a_row_end_the_process() -> None:
    world = World()
    world.runner.launch_errors = [RuntimeError("1"), RuntimeError("2"), RuntimeError("3")]
    for _ in range(3):
        world.submit([1, 2])
    with pytest.raises(RuntimeError, match="3"):
        for _ in range(10):
            world.submit([3])
            world.turn()


def test_two_failures_are_forgiven_after_a_good_step() -> None:
    world = World()
    world.runner.launch_errors = [RuntimeError(), RuntimeError(), None, RuntimeError(), RuntimeError(), None]
    for _ in range(6):
        world.submit([3], max_tokens=1)
        world.turn()
    world.run()
    assert world.metric("quartet:engine_step_errors_total") == 4


def test_a_row_without_valid_probabilities_ends_that_request_only() -> None:
    world = World()
    bad, good = world.submit([1, 2]), world.submit([3, 4])
    world.runner.errors[bad] = "numerical_error"
    world.run()
    assert world.failure(bad) == "numerical_error" and bad not in world.detoks[0].closed
    assert world.output(good) == world.expected(good)


def test_what_the_runner_will_not_admit_fails_with_its_words() -> None:
    world = World()
    rid = world.submit([1, 2])
    world.runner.refuse[rid] = QuartetError("invalid_value", "The bias is too heavy.", "logit_bias")
    other = world.submit([3, 4])
    world.run()
    assert world.failure(rid) == "invalid_value" and world.frontends[0].messages[rid] == "The bias is too heavy."
    assert world.output(other) == world.expected(other)


# ---- the stage's view --------------------------------------------------------------------------------------------

def test_an_idle_engine_waits_for_its_census() -> None:
    world = World()
    world.turn()
    assert not world.engine.has_work() and world.engine.accepting()
    assert world.engine.next_timer_ns() == 10**9 + int(world.config.timeouts.census_s * 1e9)


def test_load_and_metrics_follow_the_queue() -> None:
    world = World(max_num_seqs=2)
    for i in range(5):
        world.submit([1, 2, i], max_tokens=4, ignore_eos=True)
    world.turn(2)
    load = world.engine.load()
    assert (load.running, load.waiting, load.waiting_tokens, load.kv_total) == (2, 3, 9, 32)
    assert world.metric("vllm:num_requests_waiting") == 3 and world.metric("vllm:num_requests_running") == 2
    assert world.metric("vllm:kv_cache_usage_perc") == load.kv_used / 32
    world.run()
    assert world.metric("vllm:generation_tokens_total") == 20 and world.metric("vllm:prompt_tokens_total") == 15
    assert world.metric("vllm:request_success_total", finished_reason="length") == 5
    assert world.metric("vllm:request_prompt_tokens_count") == 5
    assert world.metric("vllm:iteration_tokens_total_sum") == sum(p.num_tokens for p in world.runner.plans)


def test_back_pressure_leaves_messages_in_the_socket_only_far_beyond_the_limit() -> None:
    world = World(max_waiting=2, max_num_seqs=1)
    for _ in range(8):
        assert world.engine.accepting()
        world.submit([1], history=[7])
    assert not world.engine.accepting()
    world.run()
    assert world.engine.accepting()


def test_scheduling_needs_no_torch() -> None:
    code = ("import engine_proc.core, engine_proc.null, engine_proc.__main__, sys;"
            "assert not {'torch', 'transformers', 'sanic'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_detok_spec_reaches_the_detokenizer_as_it_came() -> None:
    world = World()
    spec = DetokSpec(model=0, stop=["x"], include_stop=True, min_tokens=3, skip_special=False)
    rid = world.submit([1, 2], spec=spec)
    world.run()
    assert world.outcome(rid).opened.spec == spec
