"""Request ids: a frontend's process is told from its predecessors and successors, also where the short epoch wraps."""
from __future__ import annotations

import pytest

from pipeline.ids import RidMaker, outlived


@pytest.mark.parametrize("born", [1, 4090, 4095, 4096, 10_000])
def test_a_request_is_outlived_by_its_frontends_successors_alone(born: int) -> None:
    rid = RidMaker(3, born).next()
    assert [outlived(rid, born + later) for later in (1, 2, 7, 2047)] == [True] * 4
    assert not outlived(rid, born)
    assert not outlived(rid, born - 1), "a process newer than the newest that is known is not dead"
