"""Metrics between processes: what is counted by hand reads like prometheus_client's own."""
from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Histogram

from pipeline.metrics import Reading, Tallies, Tally, snapshot


def test_a_tally_is_shown_as_a_histogram() -> None:
    theirs, ours, tally = CollectorRegistry(), CollectorRegistry(), Tally((0.01, 1, 2.5))
    histogram = Histogram("x:seconds", "text", ["model"], buckets=(0.01, 1, 2.5), registry=theirs).labels("m")
    ours.register(Tallies("x:seconds", "text", ["model"], {("m",): tally}))
    for value in (0.005, 0.01, 0.5, 1, 2, 7):
        histogram.observe(value)
        tally.observe(value)
    assert snapshot(ours) == snapshot(theirs)


def test_a_reading_is_shown_as_a_counter() -> None:
    theirs, ours, count = CollectorRegistry(), CollectorRegistry(), [0]
    counter = Counter("x:tokens", "text", ["model"], registry=theirs).labels("m")
    ours.register(Reading("x:tokens", "text", {"model": "m"}, lambda: count[0]))
    assert snapshot(ours) == snapshot(theirs)
    counter.inc(7)
    count[0] += 7
    assert snapshot(ours) == snapshot(theirs)
