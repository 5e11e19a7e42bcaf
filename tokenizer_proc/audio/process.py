"""The decoder worker as its tokenizer sees it: a child process behind two pipes that never block.

Owned by Recordings, which starts it again when it has died. At most one command of each job is under way, so that the
pipe towards it, which holds hundreds of commands, cannot fill up.
"""
from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys

from tokenizer_proc.audio.protocol import Answer, Answers, BadAnswer, Command, pack_command

PIPE_BYTES = 2**20
READ_BYTES = 2**20
MAX_READS = 8                        # of one poll


class WorkerDied(Exception):
    """The worker has ended, or is of no use any more."""


class DecoderProcess:
    """One life of a worker."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tokenizer_proc.audio.worker", str(os.getpid())], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, bufsize=0, start_new_session=True)
        assert self._process.stdin is not None and self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        for end in (self._to, self._from):
            os.set_blocking(end, False)
        with contextlib.suppress(OSError):               # a window fits in: the worker goes on while we do something else
            fcntl.fcntl(self._from, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        self._answers = Answers()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, command: Command) -> None:
        """WorkerDied where nobody reads."""
        data = pack_command(command)
        try:
            if os.write(self._to, data) != len(data):
                raise WorkerDied("it does not read")
        except OSError:
            raise WorkerDied("it has ended") from None

    def poll(self) -> list[Answer]:
        """The answers that have come; WorkerDied at their end."""
        found: list[Answer] = []
        for _ in range(MAX_READS):
            try:
                data = os.read(self._from, READ_BYTES)
            except BlockingIOError:
                break
            if not data:
                if found:
                    break                                # tell what it did first
                raise WorkerDied("it has ended")
            try:
                found += self._answers.feed(data)
            except BadAnswer:
                raise WorkerDied("it talks nonsense") from None
        return found

    def close(self) -> None:
        """Kill and reap it; idempotent."""
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        self._process.wait()
