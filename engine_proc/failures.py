"""What a request is told when the engine could not compute it: of an exception, or of the code of one item of a step.

Engine process, no torch. Never a word of an exception's own text: that is for the log.
"""
from __future__ import annotations

from pipeline.errors import CATALOGUE, QuartetError


def failure_of(error: Exception) -> QuartetError:
    """A runner raised `error`."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return QuartetError("out_of_memory", "The server ran out of memory under this request.")
    return item_error("internal_error")


def item_error(code: str) -> QuartetError:
    """One item of a step failed so, its neighbours did not."""
    if code == "numerical_error":
        return QuartetError(code, "The model gave no valid probabilities for this request.")
    if code == "no_token_left":
        return QuartetError(code, "What the request forbids leaves no token that could follow.")
    return QuartetError(code if code in CATALOGUE else "internal_error", "The engine could not compute this request.")
