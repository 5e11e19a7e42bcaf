"""The restart policy, with times that the test hands in."""
from __future__ import annotations

import dataclasses

import pytest

from pipeline.config import ModelConfig, ServerConfig, TimeoutsConfig
from pipeline.messages import Beacon, Kind, Load, State
from pipeline.supervise import Life, S, Verdict, given_up_with, judge

TIMEOUTS = TimeoutsConfig(hang_s=60, start_s=300)


def life(**changes: int) -> Life:
    made = Life(Kind.ENGINE, 0)
    made.started(0)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def beacon(**changes: object) -> Beacon:
    made = Beacon(protocol=1, kind=Kind.ENGINE, index=0, epoch=1, pid=1, state=State.READY, phase="ready", percent=100,
                  tick=1, tick_age_ms=0, pending=False, load=Load())
    return dataclasses.replace(made, **changes)


def test_the_first_death_is_followed_by_a_start_at_once_with_the_next_epoch() -> None:
    it = life(ready_ns=1 * S)
    assert it.died(100 * S)
    assert it.restart_ns == 100 * S
    it.started(it.restart_ns)
    assert (it.epoch, it.restart_ns, it.ready_ns) == (2, None, None)


def test_quick_deaths_wait_a_tenth_of_a_second_and_then_twice_as_long_each_time_up_to_ten_seconds() -> None:
    it, now, delays = life(), 0, []
    for _ in range(10):
        now += 20 * S                                   # seldom enough to be no crash loop
        it.died(now)
        delays.append((it.restart_ns - now) / S)
        it.started(it.restart_ns)
    assert delays == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]


def test_a_long_life_resets_the_back_off() -> None:
    it = life()
    for now in (1 * S, 2 * S, 3 * S):
        it.died(now)
        it.started(it.restart_ns)
    it.ready_ns = 4 * S
    assert it.died(200 * S)
    assert it.restart_ns == 200 * S


def test_the_fifth_death_within_sixty_seconds_is_a_crash_loop() -> None:
    it = life()
    assert [it.died(now * S) for now in (0, 15, 30, 45, 60)] == [True, True, True, True, False]


def test_five_deaths_in_more_than_sixty_seconds_are_not() -> None:
    it = life()
    assert all(it.died(now * S) for now in range(0, 200, 16))


def test_a_crash_loop_gives_up_everybody_with_one_model_and_the_engines_of_its_model_with_several() -> None:
    def config(*replicas: int) -> ServerConfig:
        return ServerConfig(run_dir="/r", log_dir="/l", models=tuple(
            ModelConfig(names=(str(i),), path="/m", replicas=n) for i, n in enumerate(replicas)))
    one, two = config(2), config(2, 1)
    assert given_up_with(one, Kind.ENGINE, 0) == one.members()
    assert given_up_with(two, Kind.ENGINE, 1) == [(Kind.ENGINE, 0), (Kind.ENGINE, 1)]
    assert given_up_with(two, Kind.ENGINE, 2) == [(Kind.ENGINE, 2)]
    assert given_up_with(two, Kind.DETOKENIZER, 0) == two.members()


@pytest.mark.parametrize(("heard", "heard_s", "now_s", "expected"), [
    (beacon(), 100, 159, Verdict.FINE),
    (beacon(), 100, 161, Verdict.SILENT),
    (beacon(pending=True, tick_age_ms=59_000), 100, 100, Verdict.FINE),
    (beacon(pending=True, tick_age_ms=61_000), 100, 100, Verdict.HUNG),
    (beacon(pending=False, tick_age_ms=10**9), 100, 100, Verdict.FINE),
    (beacon(state=State.STARTING, pending=True, tick_age_ms=10**9), 100, 299, Verdict.FINE),
    (beacon(state=State.STARTING), 100, 301, Verdict.LATE),
    (None, 0, 299, Verdict.FINE),
    (None, 0, 301, Verdict.LATE),
    (beacon(epoch=0), 100, 299, Verdict.FINE),                       # the last beacon of its predecessor
    (beacon(epoch=0, pending=True, tick_age_ms=10**9), 100, 100, Verdict.FINE),
])
def test_verdicts(heard: Beacon | None, heard_s: int, now_s: int, expected: Verdict) -> None:
    assert judge(life(), heard, heard_s * S, now_s * S, 0, TIMEOUTS) is expected


def test_after_the_launcher_stood_still_everybody_has_time_to_speak_again() -> None:
    hung = beacon(pending=True, tick_age_ms=100_000)
    assert judge(life(), beacon(), 0, 1000 * S, 999 * S, TIMEOUTS) is Verdict.FINE
    assert judge(life(), hung, 999 * S, 1000 * S, 999 * S, TIMEOUTS) is Verdict.FINE
    assert judge(life(), hung, 1005 * S, 1005 * S, 999 * S, TIMEOUTS) is Verdict.HUNG
    assert judge(life(), None, 0, 1000 * S, 999 * S, TIMEOUTS) is Verdict.FINE
