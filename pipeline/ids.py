"""Request ids: u64 numbers that are unique across restarts and route replies without a table.

Layout from the high bits: frontend index 7 | frontend epoch 12 | counter 37 | child 8. The child numbers the choices
of one submission (``n > 1``). Every submission takes a fresh counter; a caller's own id is a label, never a key.
"""
from __future__ import annotations

CHILD_BITS = 8
COUNTER_BITS = 37
EPOCH_BITS = 12
INDEX_BITS = 7
MAX_CHILDREN = 1 << CHILD_BITS
_EPOCH_MASK = (1 << EPOCH_BITS) - 1


def family(rid: int) -> int:
    """The submission that a child belongs to: the id with child number 0."""
    return rid & ~(MAX_CHILDREN - 1)


def child(rid: int) -> int:
    return rid & (MAX_CHILDREN - 1)


def frontend_index(rid: int) -> int:
    return rid >> (EPOCH_BITS + COUNTER_BITS + CHILD_BITS)


def frontend_epoch(rid: int) -> int:
    """The low 12 bits of the frontend's epoch; compare with `short_epoch`."""
    return (rid >> (COUNTER_BITS + CHILD_BITS)) & _EPOCH_MASK


def short_epoch(epoch: int) -> int:
    return epoch & _EPOCH_MASK


def outlived(rid: int, epoch: int) -> bool:
    """Whether `epoch`, the newest known of its frontend, is that of a successor of the process that made `rid`.

    A newer process than we know of is not dead: epochs count in a circle, and what is less than half of it away is ahead.
    """
    return 0 < short_epoch(epoch - frontend_epoch(rid)) < 1 << (EPOCH_BITS - 1)


class RidMaker:
    """Makes the family ids of one frontend process; `next()` never repeats within an epoch."""

    __slots__ = ("_base", "_counter")

    def __init__(self, index: int, epoch: int) -> None:
        assert 0 <= index < 1 << INDEX_BITS
        self._base = (index << EPOCH_BITS | short_epoch(epoch)) << (COUNTER_BITS + CHILD_BITS)
        self._counter = 0

    def next(self) -> int:
        self._counter += 1
        assert self._counter < 1 << COUNTER_BITS
        return self._base | self._counter << CHILD_BITS
