"""Metrics between processes: what is counted by hand reads like prometheus_client's own."""
from __future__ import annotations

from prometheus_client import CollectorRegistry, Histogram

from pipeline.metrics import Tallies, Tally, snapshot


def test_a_tally_is_shown_as_a_histogram() -> None:
    theirs, ours, tally = CollectorRegistry(), CollectorRegistry(), Tally((0.01, 1, 2.5))
    histogram = Histogram("x:seconds", "text", ["model"], buckets=(0.01, 1, 2.5), registry=theirs).labels("m")
    ours.register(Tallies("x:seconds", "text", ["model"], {("m",): tally}))
    for value in (0.005, 0.01, 0.5, 1, 2, 7):
        histogram.observe(value)
        tally.observe(value)
    assert snapshot(ours) == snapshot(theirs)
