"""The pooling engine's Prometheus metrics, under vLLM's names where they mean the same.

Engine process, no torch. Gauges read the core when they are scraped; histograms are fed once per batch or request.
"""
from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine_proc.pooling.request import PoolRequest

LATENCIES_S = (.005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 480, 1920)
BATCH_TOKENS = tuple(8 << i for i in range(12))
BATCH_INPUTS = tuple(1 << i for i in range(11))
REASONS = ("stop", "abort", "error")
DROPS = ("misrouted", "duplicate", "aborted", "frontend_gone", "unknown_abort")


class PoolStats:
    """Counts for one pooling engine; `model_name` is the first served name."""

    def __init__(self, registry: CollectorRegistry, model_name: str, index: int, running: Callable[[], int],
                 waiting: Callable[[], int]) -> None:
        labels = {"model_name": model_name, "engine": str(index)}

        def counter(name: str, help: str) -> Counter:
            return Counter(name, help, list(labels), registry=registry).labels(**labels)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, list(labels), registry=registry, buckets=buckets).labels(**labels)

        for name, help, read in (("running", "Inputs in the batch.", running), ("waiting", "Inputs that wait.", waiting)):
            Gauge(f"vllm:num_requests_{name}", help, list(labels), registry=registry).labels(**labels).set_function(read)
        self._tokens = counter("vllm:prompt_tokens", "Tokens of inputs that were computed.")
        self._inputs = counter("quartet:pooled_inputs", "Inputs that were computed.")
        self._batch_tokens = histogram("vllm:iteration_tokens_total", "Tokens computed per batch.", BATCH_TOKENS)
        self._batch_inputs = histogram("quartet:batch_inputs", "Inputs computed per batch.", BATCH_INPUTS)
        self._batch_s = histogram("quartet:batch_seconds", "Duration of a batch.", LATENCIES_S)
        self._queue_s = histogram("vllm:request_queue_time_seconds", "Waiting, before the first batch.", LATENCIES_S)
        self._request_s = histogram("quartet:pooling_seconds", "From a request's first slice to its end.", LATENCIES_S)
        success = Counter("vllm:request_success", "Finished requests.", [*labels, "finished_reason"], registry=registry)
        self._finished = {reason: success.labels(**labels, finished_reason=reason) for reason in REASONS}
        dropped = Counter("quartet:engine_dropped", "Records that no longer concern this engine.",
                          [*labels, "reason"], registry=registry)
        self._dropped = {reason: dropped.labels(**labels, reason=reason) for reason in DROPS}
        self.refused = counter("quartet:engine_refused", "Requests refused at admission.")
        self.batch_errors = counter("quartet:engine_step_errors", "Batches that failed as a whole.")

    def drop(self, reason: str) -> None:
        self._dropped[reason].inc()

    def batch(self, num_inputs: int, num_tokens: int, seconds: float) -> None:
        self._tokens.inc(num_tokens)
        self._inputs.inc(num_inputs)
        self._batch_tokens.observe(num_tokens)
        self._batch_inputs.observe(num_inputs)
        self._batch_s.observe(seconds)

    def finished(self, request: PoolRequest, reason: str, now: int) -> None:
        self._finished[reason].inc()
        if request.started_ns:
            self._queue_s.observe((request.started_ns - request.arrived_ns) / 1e9)
        self._request_s.observe((now - request.arrived_ns) / 1e9)
