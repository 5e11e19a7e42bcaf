"""Limits on work that somebody else's program asks of us: wall-clock time and the size of values.

Used by the tokenizer for chat templates. A deadline interrupts pure Python only, so every operation that is one long
call of C code must have its size checked before (see sandbox.py); with both, nothing lasts much longer than allowed.
"""
from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, GeneratorType
from typing import Any, TypeVar

ELEMENT = 16                         # what an element of a container weighs, in characters
REPEAT_S = 0.05                      # a deadline that was swallowed by a destructor strikes again
_VIEWS: Any = (type({}.keys()), type({}.values()), type({}.items()))
_MANY: Any = (list, tuple, *_VIEWS)
T = TypeVar("T")


class DeadlinePassed(BaseException):
    """Not an Exception, so that no handler of a library swallows it."""


class TooLarge(Exception):
    """A value would have grown beyond its limit."""


def within(seconds: float, work: Callable[[], T]) -> T:
    """`work()`, or DeadlinePassed after `seconds` of wall-clock time.

    Uses SIGALRM, hence the main thread, where each stage's loop runs; elsewhere (a stage driven inside a test's
    thread) there is no deadline.
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    armed = True

    def strike(number: int, frame: FrameType | None) -> None:
        if armed:
            raise DeadlinePassed

    before = signal.signal(signal.SIGALRM, strike)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, REPEAT_S)
            return work()
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def weigh(value: Any, limit: int) -> int:
    """Characters in `value` and all that it contains, as often as it is contained; TooLarge beyond `limit`."""
    if isinstance(value, str):
        if len(value) > limit:
            raise TooLarge
        return len(value)
    if not isinstance(value, (dict, *_MANY)):
        return ELEMENT
    weight, stack = 0, list[Any]([value])
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            weight += len(item)
        elif isinstance(item, dict):
            weight += ELEMENT * 2 * len(item)
            if weight <= limit:
                stack.extend(item.keys())
                stack.extend(item.values())
        elif isinstance(item, _MANY):
            weight += ELEMENT * len(item)
            if weight <= limit:
                stack.extend(item)
        elif isinstance(item, int) and not isinstance(item, bool):
            weight += item.bit_length() // 3
        if weight > limit:
            raise TooLarge
    return weight


def gathered(value: Any, limit: int) -> Any:
    """A list in place of a generator, within `limit`; anything else unchanged."""
    if not isinstance(value, GeneratorType):
        return value
    items, weight = [], 0
    for item in value:
        weight += ELEMENT + weigh(item, limit)
        if weight > limit:
            raise TooLarge
        items.append(item)
    return items
