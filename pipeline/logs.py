"""Logging of a stage: through a bounded queue into its own rotating file, so that no disk or pipe can block a loop.

A record costs its loop an entry in a list: a thread writes what came in a moment together, warnings and worse at once.
Control characters are escaped (a prompt cannot forge a line) and prompts are never logged above DEBUG.
"""
from __future__ import annotations

import contextlib
import json
import logging
import logging.handlers
import threading
import time
from collections import deque
from pathlib import Path

MAX_QUEUED = 10_000
MAX_FILE_BYTES = 10 * 2**20
MAX_LINE = 8 * 1024
MOMENT_S = 0.05


class _JsonLines(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        line = {"ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
                "level": record.levelname, "process": self._name, "pid": record.process,
                "message": record.getMessage()[:MAX_LINE]}
        line.update(getattr(record, "fields", {}))
        return json.dumps(line)


class _File(logging.handlers.RotatingFileHandler):
    """Counts what it has written, and leaves flushing to whoever writes: the library asks the disk for both at each line."""

    size = 0

    def emit(self, record: logging.LogRecord) -> None:
        if self.stream is not None and self.size >= self.maxBytes:
            self.doRollover()
        if self.stream is None:
            self.stream = self._open()
            self.size = self.stream.tell()
        self.size += self.stream.write(self.format(record) + self.terminator)


class LogWriter(logging.Handler):
    """Takes records of any thread and writes them in one of its own. What the queue does not hold is counted and dropped."""

    def __init__(self, target: logging.Handler) -> None:
        super().__init__()
        self._target = target
        self._queue: deque[logging.LogRecord] = deque()
        self._came, self._urgent = threading.Event(), threading.Event()
        self._stopping = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued and end."""
        self._stopping = True
        self._urgent.set()
        self._came.set()
        self._thread.join()
        self._target.close()

    def emit(self, record: logging.LogRecord) -> None:
        if len(self._queue) >= MAX_QUEUED:
            self.dropped += 1
            return
        # What the arguments are may change before it is written.
        record.msg = self.format(record) if record.exc_info or record.stack_info else record.getMessage()
        record.args = record.exc_info = record.exc_text = record.stack_info = None
        self._queue.append(record)
        if record.levelno >= logging.WARNING:
            self._urgent.set()
        if not self._came.is_set():
            self._came.set()

    def _run(self) -> None:
        while not self._stopping:
            self._came.wait()
            self._urgent.wait(MOMENT_S)
            self._urgent.clear()
            self._came.clear()              # ahead of the look at the queue: what comes now wakes this thread again
            self._write()
        self._write()

    def _write(self) -> None:
        while self._queue:
            record = self._queue.popleft()
            try:
                self._target.handle(record)
            except Exception:               # a full disk: the line is lost, not the thread
                self.dropped += 1
        with contextlib.suppress(OSError):
            self._target.flush()


def setup(name: str, directory: str, level: str) -> LogWriter:
    """Send the root logger's records to ``{directory}/{name}.log``. Stop the writer at exit to flush."""
    Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    target = _File(Path(directory) / f"{name}.log", maxBytes=MAX_FILE_BYTES, backupCount=2, delay=True)
    target.setFormatter(_JsonLines(name))
    writer = LogWriter(target)
    root = logging.getLogger()
    root.handlers[:] = [writer]
    root.setLevel(level)
    writer.start()
    return writer
