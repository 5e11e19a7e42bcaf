"""What the frontend measures, under vLLM's names where it means the same.

Label sets are closed: route templates, known methods, status classes, configured model names, codes of the catalogue.
Run by the frontend; its beacon publishes the registry, and /metrics joins those of all stages.
"""
from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Summary

from frontend.admission import Admission
from frontend.pool_schema import MAX_INPUTS
from frontend.pools import PoolRequest
from frontend.recordings import RecordingRequest
from frontend.request import Request
from pipeline.config import ServerConfig
from pipeline.errors import QuartetError
from pipeline.messages import AbortReason
from pipeline.metrics import Tallies, Tally

METHODS = frozenset({"GET", "HEAD", "POST", "OPTIONS", "PUT", "DELETE", "PATCH"})
TTFT = (.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
ITL = (.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
LATENCY = (.3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
FINE = (.01, .025, .05, .075, .1, .25, .5, .75, 1, 1.5, 2, 2.5, 3, 3.5, 4, 4.5, 5, 7.5, 10, 30, 60)
ENGINE = "0"
OPEN_REQUESTS = "quartet:open_requests"


def _one_two_five(limit: int) -> list[int]:
    steps = [m * 10**e for e in range(9) for m in (1, 2, 5)]
    return [s for s in steps if s <= limit] or [1]


class FrontendMetrics:
    """The metrics of one frontend process; the table's observer."""

    def __init__(self, config: ServerConfig, registry: CollectorRegistry, index: int = 0) -> None:
        self._models = [m.names[0] for m in config.models]
        tokens = _one_two_five(max(m.max_model_len for m in config.models))

        def histogram(name: str, text: str, buckets: Sequence[float]) -> list[Histogram]:
            family = Histogram(f"vllm:{name}", text, ["model_name", "engine"], buckets=buckets, registry=registry)
            return [family.labels(name, ENGINE) for name in self._models]

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token.", TTFT)
        self._itl = [Tally(ITL) for _ in self._models]
        registry.register(Tallies("vllm:inter_token_latency_seconds", "Between tokens of a choice.", ["model_name", "engine"],
                                  {(name, ENGINE): tally for name, tally in zip(self._models, self._itl)}))
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the end.", LATENCY)
        self._n = histogram("request_params_n", "Choices asked for.", (1, 2, 5, 10, 20))
        self._max_tokens = histogram("request_params_max_tokens", "max_tokens asked for.", tokens)
        self._inputs = histogram("request_params_inputs", "Inputs of a pooling request.", _one_two_five(MAX_INPUTS))
        self._longest = histogram("request_max_num_generation_tokens", "Tokens of a request's longest choice.", tokens)
        self._requests = Counter("http_requests", "HTTP requests.", ["handler", "method", "status"], registry=registry)
        self._seconds = Histogram("http_request_duration_seconds", "Duration of HTTP requests.", ["handler", "method"],
                                  buckets=(.1, .5, 1), registry=registry)
        self._audio_s = Counter("quartet:transcribed_seconds", "Seconds of sound that were transcribed.", ["model_name"],
                                registry=registry)
        self._fine_seconds = Histogram("http_request_duration_highr_seconds", "The same for all of them, finer.",
                                       buckets=FINE, registry=registry)
        self._received = Summary("http_request_size_bytes", "Bytes of request bodies.", ["handler"], registry=registry)
        self._sent = Summary("http_response_size_bytes", "Bytes of answers' bodies.", ["handler"], registry=registry)
        self._aborts = Counter("quartet:aborts", "Requests that were not completed.", ["reason"], registry=registry)
        self._rejections = Counter("quartet:rejections", "Requests answered with an error.", ["code"],
                                   registry=registry)
        self._again = Counter("quartet:resubmissions", "Choices submitted again.", ["why"], registry=registry)
        self._unknown = Counter("quartet:unknown_ids", "Messages about requests that are not known.", ["what"],
                                registry=registry)
        self.open_requests = Gauge(OPEN_REQUESTS, "Requests accepted and not closed.", registry=registry)
        self.loop_lag = Gauge("quartet:event_loop_lag_seconds", "How late the loop's timer came last.", ["process"],
                              registry=registry).labels(f"frontend.{index}")
        for reason in AbortReason:
            self._aborts.labels(reason.name.lower())

    def watch(self, admission: Admission, registry: CollectorRegistry) -> None:
        """Show what of the permits is taken."""
        permits = Gauge("quartet:permits_in_use", "Permits taken, by what is limited.", ["limit"], registry=registry)
        permits.labels("requests").set_function(lambda: admission.requests)
        permits.labels("bytes").set_function(lambda: admission.num_bytes)
        permits.labels("tokens").set_function(lambda: admission.tokens)

    # ---- the table's observer ----

    def first_token(self, request: Request, seconds: float) -> None:
        self._ttft[request.spec.model].observe(seconds)

    def next_token(self, request: Request, seconds: float) -> None:
        self._itl[request.spec.model].observe(seconds)

    def closed(self, request: Request | PoolRequest | RecordingRequest, reason: AbortReason | None) -> None:
        if reason is not None:
            self._aborts.labels(reason.name.lower()).inc()

    def resubmitted(self, why: str) -> None:
        self._again.labels(why).inc()

    def unknown(self, what: str) -> None:
        self._unknown.labels(what).inc()

    # ---- the ingress ----

    def http(self, route: str, method: str, status: int, seconds: float, received: int = 0, sent: int = 0) -> None:
        """A call has ended; `received` and `sent` are bytes of bodies."""
        method = method if method in METHODS else "OTHER"
        self._requests.labels(route, method, f"{status // 100}xx").inc()
        self._seconds.labels(route, method).observe(seconds)
        self._fine_seconds.observe(seconds)
        self._received.labels(route).observe(received)
        self._sent.labels(route).observe(sent)

    def rejected(self, error: QuartetError) -> None:
        self._rejections.labels(error.code).inc()

    def pooled(self, request: PoolRequest, seconds: float) -> None:
        """A pooling request was computed."""
        self._e2e[request.spec.model].observe(seconds)
        self._inputs[request.spec.model].observe(len(request.rows))

    def transcribed(self, request: RecordingRequest, seconds: float) -> None:
        """A recording was transcribed."""
        self._e2e[request.spec.model].observe(seconds)
        self._audio_s.labels(self._models[request.spec.model]).inc(request.duration_s)

    def generated(self, request: Request, max_tokens: int, seconds: float) -> None:
        """A request was answered completely."""
        model = request.spec.model
        self._e2e[model].observe(seconds)
        self._n[model].observe(request.spec.n)
        self._max_tokens[model].observe(max_tokens)
        self._longest[model].observe(max(len(choice.ids) for choice in request.choices))
