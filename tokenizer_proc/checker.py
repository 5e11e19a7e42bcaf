"""Checks grammars beside the tokenizer's loop, each in a process that may die of it.

Owned by the worker. Two threads, each with a process (`grammar_check`) that it starts when it is first needed and again
when it has died or took too long. What was found good is remembered by its digest, within bounds.
"""
from __future__ import annotations

import hashlib
import logging
import os
import queue
import select
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

from pipeline.errors import QuartetError, invalid
from tokenizer_proc.grammar_check import NOT_COMPILED, frame, read_frame

CHECK_S = 3.0                        # of one grammar
KNOWN = 4096                         # digests of grammars that are good
THREADS = 2                          # one hostile grammar does not hold up the next
log = logging.getLogger(__name__)


class Checks(Protocol):
    def check(self, text: str) -> str:
        """What is wrong with a grammar; "" for a good one."""


class CheckProcess:
    """The process of one thread. It dies with that thread's process."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, text: str, seconds: float = CHECK_S) -> str:
        """What is wrong with a grammar; "" for a good one."""
        if self._process is None or self._process.poll() is not None:
            self.close()
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tokenizer_proc.grammar_check", str(os.getpid())], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(frame(text))
            process.stdin.flush()
            if select.select([process.stdout], [], [], seconds)[0]:
                answer = read_frame(process.stdout)
                if answer is not None:
                    return answer
        except OSError:
            pass                                          # it died before it read
        else:
            if process.poll() is None and not select.select([process.stdout], [], [], 0)[0]:
                self.close()
                return "it takes too long to check"
        self.close()
        log.warning("a grammar of %d characters ended its check", len(text))
        return NOT_COMPILED

    def close(self) -> None:
        """Kill and reap it; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        process.wait()


class GrammarChecker:
    """Takes grammars and gives back what was found; nothing here blocks its caller. `start` makes what checks."""

    def __init__(self, start: Callable[[], Checks] = CheckProcess) -> None:
        self._start = start
        self._todo: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
        self._done: deque[tuple[int, str, str]] = deque()
        self._threads: list[threading.Thread] = []
        self._known: OrderedDict[bytes, None] = OrderedDict()

    def knows(self, text: str) -> bool:
        """Whether this grammar was found good before."""
        key = _digest(text)
        if key not in self._known:
            return False
        self._known.move_to_end(key)
        return True

    def submit(self, rid: int, text: str) -> None:
        if not self._threads:
            self._threads = [threading.Thread(target=self._run, name=f"grammars-{i}", daemon=True)
                             for i in range(THREADS)]
            for thread in self._threads:
                thread.start()
        self._todo.put((rid, text))

    def take(self) -> list[tuple[int, QuartetError | None]]:
        """What was checked since the last call: the request, and what is wrong."""
        taken: list[tuple[int, QuartetError | None]] = []
        while self._done:
            rid, text, complaint = self._done.popleft()
            if complaint:
                taken.append((rid, invalid(f"The grammar cannot be used: {complaint}.")))
                continue
            self._known[_digest(text)] = None
            while len(self._known) > KNOWN:
                self._known.popitem(last=False)
            taken.append((rid, None))
        return taken

    def _run(self) -> None:
        process = self._start()
        while True:
            rid, text = self._todo.get()
            try:
                complaint = process.check(text)
            except Exception as error:                    # no process could be started
                log.error("grammars cannot be checked: %s", type(error).__name__)
                complaint = "this server cannot check it now"
            self._done.append((rid, text, complaint))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
