"""What the pooling engine tells frontends: results in slices, failures, censuses; kept while a frontend does not take it.

Engine process, no torch. A frontend that has something waiting here gets nothing new computed (`held_up`), so that what
waits is bounded by one batch and by one record for each request that failed. Must never block.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.errors import QuartetError
from pipeline.ids import frontend_index
from pipeline.messages import Census, Failed, FailedItem, Kind, Pooled, Transcribed, pack_rids
from pipeline.transport import Address, Sender

MAX_MESSAGE_BYTES = 16 * 2**20   # of one slice, unless a single input gives more
RETRY_NS = 5_000_000             # how soon a frontend that refused is tried again
HIGH_PRESSURE = 0.5


@dataclass(slots=True)
class Box:
    """What waits for one frontend."""

    to: Address
    pooled: deque[Pooled | Transcribed] = field(default_factory=deque)
    failed: list[FailedItem] = field(default_factory=list)
    census: Census | None = None
    retry_ns: int = 0

    def __bool__(self) -> bool:
        return bool(self.pooled or self.failed or self.census)


class PoolOutputs:
    """Boxes for every frontend of one engine."""

    def __init__(self, index: int, epoch: int, sender: Sender) -> None:
        self._index, self._epoch, self._sender = index, epoch, sender
        self._boxes: dict[int, Box] = {}
        self.held_up: frozenset[int] = frozenset()       # frontends for which nothing should be computed now
        self.retry_ns: int | None = None                 # when `flush` is due again; None: nothing waits

    def emit(self, rid: int, results: Sequence[tuple[int, int, np.ndarray]]) -> None:
        """Results of some inputs of a request: (index, tokens, rows) each."""
        start = size = 0
        for end, (_, _, rows) in enumerate(results):
            if size and size + rows.nbytes > MAX_MESSAGE_BYTES:
                self._emit(rid, results[start:end])
                start, size = end, 0
            size += rows.nbytes
        self._emit(rid, results[start:])

    def _emit(self, rid: int, results: Sequence[tuple[int, int, np.ndarray]]) -> None:
        numbers = np.array([(index, tokens, len(rows)) for index, tokens, rows in results], "<u4")
        data = results[0][2] if len(results) == 1 else np.concatenate([rows for _, _, rows in results])
        self._box(rid).pooled.append(Pooled(
            self._index, self._epoch, rid, numbers[:, 0].tobytes(), numbers[:, 1].tobytes(), numbers[:, 2].tobytes(),
            np.ascontiguousarray(data, np.float32)))

    def put(self, message: Transcribed) -> None:
        """What a speech engine has to say about one window."""
        self._box(message.rid).pooled.append(message)

    def fail(self, rid: int, error: QuartetError) -> None:
        self._box(rid).failed.append(FailedItem(rid, error.code, error.message, error.param))

    def forget(self, rid: int) -> None:
        """Results of a request that nobody waits for any longer."""
        box = self._box(rid)
        box.pooled = deque(pooled for pooled in box.pooled if pooled.rid != rid)

    def census(self, frontend: int, rids: list[int]) -> None:
        """`rids` and those whose results wait here. A newer census takes the place of one that waits."""
        box = self._frontend(frontend)
        held = dict.fromkeys([*rids, *(pooled.rid for pooled in box.pooled)])
        box.census = Census(self._index, self._epoch, pack_rids(held))

    def _box(self, rid: int) -> Box:
        return self._frontend(frontend_index(rid))

    def _frontend(self, index: int) -> Box:
        if index not in self._boxes:
            self._boxes[index] = Box(Address(Kind.FRONTEND, index))
        return self._boxes[index]

    def flush(self, now: int) -> None:
        """Hand over what waits."""
        held_up = []
        self.retry_ns = None
        for index, box in self._boxes.items():
            if box and box.retry_ns <= now and not self._send(box):
                box.retry_ns = now + RETRY_NS
            if box:
                self.retry_ns = box.retry_ns if self.retry_ns is None else min(self.retry_ns, box.retry_ns)
            if box or self._sender.pressure(box.to) >= HIGH_PRESSURE:
                held_up.append(index)
        self.held_up = frozenset(held_up)

    def _send(self, box: Box) -> bool:
        send, to = self._sender.send, box.to
        while box.pooled:
            if not send(to, box.pooled[0]):
                return False
            box.pooled.popleft()
        if box.failed:
            if not send(to, Failed(Kind.ENGINE, self._index, self._epoch, box.failed)):
                return False
            box.failed = []
        if box.census is not None:
            if not send(to, box.census):
                return False
            box.census = None
        return True

    def peer_restarted(self, kind: Kind, index: int) -> None:
        """What waits for a predecessor of this frontend is worthless."""
        if kind is Kind.FRONTEND:
            self._boxes.pop(index, None)

    def __bool__(self) -> bool:
        return any(self._boxes.values())
