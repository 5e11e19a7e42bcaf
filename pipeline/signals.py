"""Signals of the launcher: handlers only note the number, and a descriptor wakes whoever polls. Main thread only."""
from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections import deque
from types import FrameType, TracebackType

WATCHED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Signals:
    """While entered, SIGTERM, SIGINT and SIGHUP are noted in `pending` and make `fd` readable."""

    def __init__(self) -> None:
        self.pending: deque[int] = deque(maxlen=100)
        self._read, self._write = socket.socketpair()
        for end in (self._read, self._write):
            end.setblocking(False)
        self._terminal = os.isatty(0)

    @property
    def fd(self) -> int:
        return self._read.fileno()

    def __enter__(self) -> Signals:
        signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._note) for number in WATCHED}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(-1)
        self._read.close()
        self._write.close()

    def clear(self) -> None:
        """Forget the wake-ups; `pending` keeps the numbers."""
        with contextlib.suppress(BlockingIOError):
            while self._read.recv(4096):
                pass

    def take(self) -> list[int]:
        """The signals since the last call. The SIGHUP of a closed terminal counts as SIGTERM."""
        taken = []
        while self.pending:
            number = self.pending.popleft()
            gone = number == signal.SIGHUP and self._terminal and not os.isatty(0)
            taken.append(int(signal.SIGTERM) if gone else number)
        return taken

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.pending.append(number)
