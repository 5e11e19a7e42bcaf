"""What the launcher says on the terminal: through a bounded queue and a thread, so that a stuck terminal or pipe never
stops the launcher. Also keeps the start quiet: at most MAX_PROGRESS lines of progress.
"""
from __future__ import annotations

import contextlib
import queue
import sys
import threading
from typing import TextIO

MAX_QUEUED = 1000
MAX_PROGRESS = 10
CLOSE_S = 1.0


class Terminal:
    """Lines to a stream (standard error). Lines that do not fit into the queue are dropped."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._queue: queue.Queue[str | None] = queue.Queue(MAX_QUEUED)
        self._progress = 0
        self._thread = threading.Thread(target=self._run, name="terminal", daemon=True)
        self._thread.start()

    def line(self, text: str) -> None:
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(text)

    def progress(self, text: str) -> None:
        """A line about the start; only the first MAX_PROGRESS are shown."""
        self._progress += 1
        if self._progress <= MAX_PROGRESS:
            self.line(text)

    def close(self) -> None:
        """Write what is queued, for a second at most."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while (text := self._queue.get()) is not None:
            with contextlib.suppress(OSError, ValueError):       # the terminal is gone
                self._stream.write(text + "\n")
                self._stream.flush()
