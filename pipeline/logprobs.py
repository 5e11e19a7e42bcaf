"""Log-probabilities in pieces: counting, cutting and joining the arrays of `messages.Logprobs`."""
from __future__ import annotations

from pipeline.messages import Logprobs


def size_of(logprobs: Logprobs) -> int:
    """The number of tokens described; ValueError where the arrays do not fit each other."""
    n, k = len(logprobs.values) // 4, logprobs.k
    expected = (len(logprobs.values) == 4 * n, len(logprobs.ranks) == 4 * n, len(logprobs.top_ids) == 4 * n * k,
                len(logprobs.top_values) == 4 * n * k, len(logprobs.tokens) == n, len(logprobs.top_tokens) == n * k)
    if not all(expected):
        raise ValueError("arrays of log-probabilities of different lengths")
    return n


def cut_logprobs(logprobs: Logprobs, begin: int, end: int | None = None) -> Logprobs:
    """Tokens begin to end - 1, by default all from `begin` on."""
    k, end = logprobs.k, len(logprobs.values) // 4 if end is None else end
    return Logprobs(
        k, logprobs.values[4 * begin:4 * end], logprobs.ranks[4 * begin:4 * end],
        logprobs.top_ids[4 * k * begin:4 * k * end], logprobs.top_values[4 * k * begin:4 * k * end],
        logprobs.tokens[begin:end], logprobs.top_tokens[k * begin:k * end])


def join_logprobs(parts: list[Logprobs]) -> Logprobs:
    """All parts, one at least, one after the other; they have the same k."""
    if len(parts) == 1:
        return parts[0]
    return Logprobs(
        parts[0].k, b"".join([p.values for p in parts]), b"".join([p.ranks for p in parts]),
        b"".join([p.top_ids for p in parts]), b"".join([p.top_values for p in parts]),
        [t for p in parts for t in p.tokens], [t for p in parts for t in p.top_tokens])
