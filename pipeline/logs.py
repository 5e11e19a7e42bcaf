"""Logging of a stage: through a bounded queue into its own rotating file, so that no disk or pipe can block a loop.

Control characters are escaped (a prompt cannot forge a line) and prompts are never logged above DEBUG.
"""
from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import time
from pathlib import Path

MAX_QUEUED = 10_000
MAX_FILE_BYTES = 10 * 2**20
MAX_LINE = 8 * 1024


class _JsonLines(logging.Formatter):
    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def format(self, record: logging.LogRecord) -> str:
        line = {"ts": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
                "level": record.levelname, "process": self._name, "pid": record.process,
                "message": record.getMessage()[:MAX_LINE]}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)[:MAX_LINE]
        line.update(getattr(record, "fields", {}))
        return json.dumps(line)


class _Dropping(logging.handlers.QueueHandler):
    """Counts what does not fit instead of blocking or raising."""

    dropped = 0

    def enqueue(self, record: logging.LogRecord) -> None:
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.dropped += 1


def setup(name: str, directory: str, level: str) -> logging.handlers.QueueListener:
    """Send the root logger's records to ``{directory}/{name}.log``. Stop the listener at exit to flush."""
    Path(directory).mkdir(parents=True, exist_ok=True, mode=0o700)
    target = logging.handlers.RotatingFileHandler(
        Path(directory) / f"{name}.log", maxBytes=MAX_FILE_BYTES, backupCount=2, delay=True)
    target.setFormatter(_JsonLines(name))
    listener = logging.handlers.QueueListener(queue.Queue(MAX_QUEUED), target)
    root = logging.getLogger()
    root.handlers[:] = [_Dropping(listener.queue)]
    root.setLevel(level)
    listener.start()
    return listener
