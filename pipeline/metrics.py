"""Metrics between processes: a stage's prometheus registry as records, and the text of many such snapshots.

Each stage keeps ordinary prometheus_client objects; its beacon carries a snapshot once a second, and any frontend can
answer /metrics for all. Label sets are closed: nothing that a caller sends becomes a label.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.utils import floatToGoString

from pipeline.messages import MetricFamily, MetricSample

MAX_SAMPLES = 20_000
# Names that older boards ask for: shown beside today's with the same values, and kept nowhere.
FORMER_NAMES = {
    "vllm:inter_token_latency_seconds": "vllm:time_per_output_token_seconds",
    "vllm:kv_cache_usage_perc": "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries": "vllm:gpu_prefix_cache_queries",
    "vllm:prefix_cache_hits": "vllm:gpu_prefix_cache_hits",
}


class Tally:
    """A histogram's counts for one set of labels, for what is observed with every token: no lock, one thread observes."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.total = list(bounds), [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Tallies:
    """A histogram of tallies, to be registered with a registry."""

    def __init__(self, name: str, text: str, labels: Sequence[str], tallies: dict[tuple[str, ...], Tally]) -> None:
        self._name, self._text, self._labels, self._tallies = name, text, list(labels), tallies

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(self._name, self._text, labels=self._labels)
        for values, tally in self._tallies.items():
            buckets, seen = list[tuple[str, float]](), 0
            for bound, count in zip((*map(floatToGoString, tally.bounds), "+Inf"), tally.counts):
                seen += count
                buckets.append((bound, seen))
            family.add_metric(values, buckets, tally.total)
        yield family


class Reading:
    """A counter whose value is kept elsewhere and read when it is shown, to be registered with a registry."""

    def __init__(self, name: str, text: str, labels: Mapping[str, str], read: Callable[[], float]) -> None:
        self._name, self._text, self._labels, self._read = name, text, labels, read

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(self._name, self._text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), self._read())
        yield family


def snapshot(registry: CollectorRegistry) -> list[MetricFamily]:
    """Every family of `registry` with its samples; creation times are left out."""
    families = []
    for metric in registry.collect():
        samples = [MetricSample(s.name, [part for pair in s.labels.items() for part in pair], float(s.value))
                   for s in metric.samples if not s.name.endswith("_created")]
        families.append(MetricFamily(metric.name, metric.type, metric.documentation, samples))
    return families


class _Merged:
    """A collector over snapshots: families of one name are joined, samples of one name and labels are added up."""

    def __init__(self, snapshots: Iterable[list[MetricFamily]]) -> None:
        self._snapshots = list(snapshots)

    def collect(self) -> Iterator[Metric]:
        heads: dict[str, MetricFamily] = {}
        values: dict[str, dict[tuple[str, tuple[str, ...]], float]] = {}
        for families in self._snapshots:
            for family in families:
                heads.setdefault(family.name, family)
                bucket = values.setdefault(family.name, {})
                for sample in family.samples[:MAX_SAMPLES]:
                    key = (sample.name, tuple(sample.labels))
                    bucket[key] = bucket.get(key, 0.0) + sample.value
        for name, head in heads.items():
            for shown in filter(None, (name, FORMER_NAMES.get(name))):
                metric = Metric(shown, head.help, head.type)
                for (sample_name, labels), value in values[name].items():
                    metric.add_sample(shown + sample_name.removeprefix(name), dict(zip(labels[::2], labels[1::2])), value)
                yield metric


def exposition(snapshots: Iterable[list[MetricFamily]]) -> bytes:
    """Prometheus text format 0.0.4 of all snapshots together."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Merged(snapshots))  # type: ignore[arg-type]
    return generate_latest(registry)
