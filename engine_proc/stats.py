"""The engine's Prometheus metrics, under vLLM's names where they mean the same.

Engine process, no torch. Gauges and what is counted with every step are plain integers that are read when they are
scraped, from the beacon's thread; counters of what is rarer and histograms of requests are prometheus_client's.
"""
from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from engine_proc.request import Sequence
from engine_proc.scheduler import Scheduler
from pipeline.ids import child
from pipeline.messages import Finish
from pipeline.metrics import Reading, Tallies, Tally

LATENCIES_S = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
PER_TOKEN_S = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
STEP_TOKENS = (1, *(8 << i for i in range(12)))
REASONS = {Finish.EOS: "stop", Finish.STOP_ID: "stop", Finish.STOP_STRING: "stop", Finish.LENGTH: "length",
           Finish.COMPLETE: "stop", Finish.ABORT: "abort", Finish.ERROR: "error", Finish.REPETITION: "repetition"}
DROPS = ("misrouted", "duplicate", "aborted", "detokenizer_gone", "frontend_gone", "unknown_abort", "unknown_stop")


def token_buckets(max_model_len: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20 ... up to the context length."""
    return tuple(b for i in range(10) for b in (10**i, 2 * 10**i, 5 * 10**i) if b <= max_model_len) or (1,)


class Stats:
    """Counts for one engine; `model_name` is the first served name."""

    def __init__(self, registry: CollectorRegistry, model_name: str, index: int, scheduler: Scheduler,
                 max_model_len: int) -> None:
        labels = {"model_name": model_name, "engine": str(index)}

        def gauge(name: str, help: str) -> Gauge:
            return Gauge(name, help, list(labels), registry=registry).labels(**labels)

        def counter(name: str, help: str) -> Counter:
            return Counter(name, help, list(labels), registry=registry).labels(**labels)

        def reading(name: str, help: str, read: Callable[[], int]) -> None:
            registry.register(Reading(name, help, labels, read))  # type: ignore[arg-type]

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, help, list(labels), registry=registry, buckets=buckets).labels(**labels)

        self._step_tokens = Tally(STEP_TOKENS)
        self._generated = self._prompted = 0
        pool = scheduler.pool
        gauge("vllm:num_requests_running", "Sequences in the batch.").set_function(lambda: len(scheduler.running))
        gauge("vllm:num_requests_waiting", "Sequences that wait.").set_function(lambda: scheduler.num_waiting)
        gauge("vllm:kv_cache_usage_perc", "Used share of the KV cache, 0 to 1.").set_function(
            lambda: pool.num_used / (pool.num_blocks - 1))
        Gauge("vllm:cache_config_info", "The KV cache: 1, with its configuration as labels.",
              ["engine", "block_size", "num_gpu_blocks", "enable_prefix_caching"], registry=registry).labels(
            str(index), str(pool.block_size), str(pool.num_blocks), str(pool.caching)).set(1)
        reading("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", lambda: scheduler.cache_queries)
        reading("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.", lambda: scheduler.cache_hits)
        reading("vllm:num_preemptions", "Sequences whose blocks were taken back.", lambda: scheduler.num_preemptions)
        reading("vllm:prompt_tokens", "Prompt tokens of requests that began to answer.", lambda: self._prompted)
        reading("vllm:generation_tokens", "Tokens generated.", lambda: self._generated)
        registry.register(Tallies("vllm:iteration_tokens_total", "Tokens computed per step.", list(labels),
                                  {tuple(labels.values()): self._step_tokens}))
        self._queue_s = histogram("vllm:request_queue_time_seconds", "Waiting, before the first step.", LATENCIES_S)
        self._inference_s = histogram("vllm:request_inference_time_seconds", "First step to the end.", LATENCIES_S)
        self._per_token_s = histogram(
            "vllm:request_time_per_output_token_seconds", "Mean time between the tokens of a request.", PER_TOKEN_S)
        self._prefill_s = histogram("vllm:request_prefill_time_seconds", "First step to first token.", LATENCIES_S)
        self._decode_s = histogram("vllm:request_decode_time_seconds", "First to last token.", LATENCIES_S)
        tokens = token_buckets(max_model_len)
        self._request_prompt = histogram("vllm:request_prompt_tokens", "Prompt tokens per request.", tokens)
        self._request_generation = histogram("vllm:request_generation_tokens", "Tokens generated per request.", tokens)
        success = Counter("vllm:request_success", "Finished requests.", [*labels, "finished_reason"], registry=registry)
        self._finished = {finish: success.labels(**labels, finished_reason=r) for finish, r in REASONS.items()}
        dropped = Counter("quartet:engine_dropped", "Records that no longer concern this engine.",
                          [*labels, "reason"], registry=registry)
        self._dropped = {reason: dropped.labels(**labels, reason=reason) for reason in DROPS}
        self.refused = counter("quartet:engine_refused", "Requests refused at admission.")
        self.step_errors = counter("quartet:engine_step_errors", "Steps that failed as a whole.")
        self.stuck_peers = counter("quartet:engine_stuck_peers", "Times that a destination took nothing for too long.")

    def drop(self, reason: str) -> None:
        self._dropped[reason].inc()

    def step(self, num_tokens: int, generated: int, prompt_tokens: int) -> None:
        """A step was collected."""
        self._step_tokens.observe(num_tokens)
        self._generated += generated
        self._prompted += prompt_tokens

    def finished(self, seq: Sequence, now: int) -> None:
        self._finished[seq.finish].inc()
        if seq.started_ns:
            self._queue_s.observe((seq.started_ns - seq.arrived_ns) / 1e9)
        if seq.first_token_ns:
            self._prefill_s.observe((seq.first_token_ns - seq.started_ns) / 1e9)
            self._decode_s.observe((now - seq.first_token_ns) / 1e9)
            self._inference_s.observe((now - seq.started_ns) / 1e9)
            if seq.num_output > 1:
                self._per_token_s.observe((now - seq.first_token_ns) / 1e9 / (seq.num_output - 1))
            self._request_generation.observe(seq.num_output)
            if child(seq.rid) == 0:
                self._request_prompt.observe(seq.num_prompt)
