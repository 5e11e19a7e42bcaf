"""Admission: permits over requests, body bytes and estimated tokens in flight, so that overload is answered at once.

Each frontend process has its share of the limits. A permit belongs to one request and is released with it, by scope or
by `Request` closing; a continuation after a death keeps the permit that it has and is never refused.
"""
from __future__ import annotations

from types import TracebackType

from pipeline.config import LimitsConfig
from pipeline.errors import QuartetError

UNSET_OUTPUT_TOKENS = 1024       # what a request that names no max_tokens is taken to generate
BYTES_PER_TOKEN = 4


class Permit:
    """A share of the limits, given back once."""

    __slots__ = ("_admission", "num_bytes", "tokens", "_held")

    def __init__(self, admission: Admission, num_bytes: int, tokens: int) -> None:
        self._admission, self.num_bytes, self.tokens, self._held = admission, num_bytes, tokens, True

    def release(self) -> None:
        """Give the share back; idempotent."""
        if self._held:
            self._held = False
            self._admission._give_back(self)

    def __enter__(self) -> Permit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Admission:
    """The permits of one frontend process."""

    def __init__(self, limits: LimitsConfig, shares: int = 1) -> None:
        self.max_requests = max(1, limits.max_requests // shares)
        self.max_bytes = max(1, limits.max_bytes // shares)
        self.max_tokens = max(1, limits.max_tokens // shares)
        self.requests = self.num_bytes = self.tokens = 0

    def acquire(self, num_bytes: int, tokens: int) -> Permit:
        """A permit, or QuartetError server_overloaded. What exceeds a limit alone is let in when nothing else runs."""
        for limit, used, asked, maximum in (
                ("requests", self.requests, 1, self.max_requests), ("bytes", self.num_bytes, num_bytes, self.max_bytes),
                ("tokens", self.tokens, tokens, self.max_tokens)):
            if used + asked > maximum and self.requests:
                raise QuartetError("server_overloaded", f"The server is at its limit of {limit} in flight; retry soon.")
        self.requests += 1
        self.num_bytes += num_bytes
        self.tokens += tokens
        return Permit(self, num_bytes, tokens)

    def _give_back(self, permit: Permit) -> None:
        self.requests -= 1
        self.num_bytes -= permit.num_bytes
        self.tokens -= permit.tokens

    def assert_invariants(self) -> None:
        assert self.requests >= 0 and self.num_bytes >= 0 and self.tokens >= 0
        assert self.requests or not (self.num_bytes or self.tokens)


def estimate_tokens(prompt_bytes: int, num_prompts: int, n: int, max_tokens: int | None, max_model_len: int) -> int:
    """Prompt and output tokens that a request is taken to cost, before anything is tokenized."""
    prompt = min(prompt_bytes // BYTES_PER_TOKEN + num_prompts, num_prompts * max_model_len)
    output = min(UNSET_OUTPUT_TOKENS if max_tokens is None else max_tokens, max_model_len)
    return prompt + num_prompts * n * output
