"""Arrays of log-probabilities: counted, cut and joined."""
from __future__ import annotations

import pytest

from pipeline.logprobs import cut_logprobs, join_logprobs, size_of
from pipeline.messages import Logprobs, pack_ids


def made(*tokens: str) -> Logprobs:
    """Two alternatives to each token."""
    n = len(tokens)
    return Logprobs(2, bytes(range(4 * n)), pack_ids(range(n)), pack_ids(range(2 * n)), bytes(range(8 * n)),
                    [t.encode() for t in tokens], [f"{t}{i}".encode() for t in tokens for i in range(2)])


def test_pieces_are_what_they_were_cut_from() -> None:
    whole = made("a", "b", "c")
    first, rest = cut_logprobs(whole, 0, 1), cut_logprobs(whole, 1)
    assert size_of(whole) == 3 and size_of(first) == 1 and size_of(rest) == 2
    assert rest.tokens == [b"b", b"c"] and rest.top_tokens == [b"b0", b"b1", b"c0", b"c1"]
    assert join_logprobs([first, rest]) == whole == join_logprobs([whole])


def test_arrays_that_do_not_fit_each_other_are_refused() -> None:
    whole = made("a", "b", "c")
    whole.tokens.pop()
    with pytest.raises(ValueError):
        size_of(whole)
