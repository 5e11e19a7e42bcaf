"""Child processes: how they are started, watched, signalled and reaped. Run by the launcher only.

`subprocess` and never fork: each child starts clean, with its own session (the terminal's Ctrl-C reaches the launcher
alone), its output in a file, and a pidfd that wakes the launcher when it ends. It arranges its own death with ours.
"""
from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.messages import Kind

FOLDERS = {Kind.FRONTEND: "frontend", Kind.TOKENIZER: "tokenizer_proc", Kind.ENGINE: "engine_proc",
           Kind.DETOKENIZER: "detok_proc"}
SECRET_VARIABLES = ("QUARTET_API_KEY",)
MAX_OUTPUT_BYTES = 8 * 2**20
LAST_BYTES = 16 * 1024
ROOT = Path(__file__).resolve().parent.parent


class Child:
    """One running child process and the file that takes its output."""

    def __init__(self, command: Sequence[str], *, environment: Mapping[str, str], output: Path,
                 pass_fds: Sequence[int] = (), stdout: int | None = None, nice: int = 0) -> None:
        """`nice`: how much less than we the child is to be preferred for the processor."""
        self.output = output
        with open(output, "ab", opener=lambda path, flags: os.open(path, flags, 0o600)) as stream:
            self._offset = stream.tell()
            self._popen = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream if stdout is None else stdout, stderr=stream,
                env=environment, pass_fds=pass_fds, close_fds=True, start_new_session=True)
        if nice:                                 # at once, as the threads that it is going to make inherit it
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self.pid, min(19, os.nice(0) + nice))
            with contextlib.suppress(OSError):       # where the kernel shares out by session, this is what counts
                Path(f"/proc/{self.pid}/autogroup").write_text(f"{nice}\n")
        self.stdout = self._popen.stdout
        try:
            self.pidfd = os.pidfd_open(self.pid)
        except OSError:                      # a container's seccomp profile may refuse it: the launcher polls then
            self.pidfd = -1

    @property
    def pid(self) -> int:
        return self._popen.pid

    def signal(self, number: int) -> None:
        """Send a signal to the process itself; harmless when it has ended."""
        self._popen.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the process and whatever it started in its session."""
        if self._popen.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def ended(self) -> int | None:
        """None while it runs; else kill what it left in its session, reap it, and return its code (signal: negative).

        The group is killed before the reaping, while the process id cannot belong to anybody else.
        """
        if self._popen.returncode is None:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return None
            self.kill()
            self._popen.wait()
            if self.pidfd >= 0:
                os.close(self.pidfd)
                self.pidfd = -1
            if self.stdout is not None:
                self.stdout.close()
        return self._popen.returncode

    def destroy(self) -> None:
        """Kill and reap, whatever its state."""
        self.kill()
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        self.ended()

    def last_words(self) -> list[str]:
        """The last lines that this run wrote, without empty ones."""
        try:
            with open(self.output, "rb") as stream:
                size = stream.seek(0, os.SEEK_END)
                stream.seek(max(self._offset if self._offset <= size else 0, size - LAST_BYTES))
                text = stream.read(LAST_BYTES).decode(errors="replace")
        except OSError:
            return []
        return [line.rstrip() for line in text.splitlines() if line.strip()]

    def trim(self) -> None:
        """Keep the output file bounded: what a library prints in a loop must not fill the disk."""
        with contextlib.suppress(OSError):
            if self.output.stat().st_size > MAX_OUTPUT_BYTES:
                os.truncate(self.output, 0)
                self._offset = 0


def stage_command(kind: Kind, config_path: Path, index: int, epoch: int, listen_fd: int | None = None) -> list[str]:
    """The command line of a stage; the same by which one starts it by hand."""
    command = [sys.executable, "-m", FOLDERS[kind], "--config", str(config_path), "--index", str(index),
               "--epoch", str(epoch)]
    return command if listen_fd is None else [*command, "--listen-fd", str(listen_fd)]


def environment(*, one_thread: bool, shared: bool = False) -> dict[str, str]:
    """What a child inherits: no secret, our own modules first and the current directory never.

    shared: other engines compute beside it, so that its threads must not spin while they wait.
    """
    variables = {name: value for name, value in os.environ.items() if name not in SECRET_VARIABLES}
    paths = [str(ROOT), *filter(None, variables.get("PYTHONPATH", "").split(os.pathsep))]
    variables.update(PYTHONPATH=os.pathsep.join(dict.fromkeys(paths)), PYTHONSAFEPATH="1",
                     TOKENIZERS_PARALLELISM="false")
    if one_thread:
        variables["OMP_NUM_THREADS"] = "1"
    if shared:
        variables.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    return variables


def reap_strangers(ours: set[int]) -> None:
    """As process 1 of a container: reap orphans that are not our children."""
    if os.getpid() != 1:
        return
    with contextlib.suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and ended.si_pid not in ours:
            os.waitpid(ended.si_pid, 0)


def describe_exit(code: int) -> str:
    """'exit code 3' or 'signal SIGSEGV'."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
