"""What every engine does for its frontends: aborts read, and what it holds told apart by frontend, for censuses.

Engine process; the cores of text, pooling and speech call it. No torch, no state.
"""
from __future__ import annotations

from array import array
from collections.abc import Iterable

from pipeline.ids import frontend_index
from pipeline.messages import Abort, unpack_rids
from pipeline.schema import BadFrame


def aborted(message: Abort) -> array[int]:
    """The ids of an abort; BadFrame where they are none."""
    try:
        return unpack_rids(message.rids)
    except ValueError:
        raise BadFrame("an abort of ragged ids") from None


def by_frontend(rids: Iterable[int], count: int) -> list[list[int]]:
    """Those of `rids` that are of each of `count` frontends."""
    mine: list[list[int]] = [[] for _ in range(count)]
    for rid in rids:
        mine[frontend_index(rid)].append(rid)
    return mine
