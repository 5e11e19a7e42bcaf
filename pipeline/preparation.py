"""Runs ``python -m engine_proc.prepare`` for the launcher: converts or fetches a checkpoint where that is needed.

A process of its own, because the command line never imports torch. It dies with the launcher, and a signal ends it.
"""
from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.checkpoint import Source, cache_root
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MEMORY, MODEL_LOAD
from pipeline.procs import Child, describe_exit, environment
from pipeline.signals import Signals
from pipeline.terminal import Terminal

if TYPE_CHECKING:
    from pipeline.served import Served

MAX_LINE_BYTES = 64 * 1024


class Stopped(Exception):
    """A signal asked for the end while the checkpoint was prepared."""


class Preparation:
    """One model's preparation: done at once, or a process that is followed."""

    def __init__(self, source: Source, tokenizer: str | None, *, trust_remote_code: bool, null: bool, output: Path,
                 command: Sequence[str] | None = None) -> None:
        """`output` takes what the process prints. null: no weights are needed, so a directory with a tokenizer.json is
        taken as it is."""
        self.source = source
        self.child: Child | None = None
        self.result: tuple[Path, Path] | None = None     # (directory of the weights, directory of the tokenizer)
        self._closed = False
        self._rest = self._last = b""
        self._phase = ""
        chosen = None if tokenizer is None else Path(tokenizer).expanduser().absolute()
        if chosen is not None and not chosen.is_dir():
            raise StartError(CONFIG, f"There is no tokenizer directory '{tokenizer}'.")
        home = chosen if chosen is not None else Path(source.where) if source.is_directory else None
        if null and home is not None and (home / "tokenizer.json").is_file():
            self.result = (Path(source.where) if source.is_directory else home), home
            return
        if command is None:
            command = [sys.executable, "-m", "pipeline.parent", str(os.getpid()), "engine_proc.prepare", "--source",
                       source.where, "--out-root", str(cache_root())]
            command = [*command, "--tokenizer", str(chosen)] if chosen is not None else command
            command = [*command, "--trust-remote-code"] if trust_remote_code else command
        self.child = Child(command, environment=environment(one_thread=False), output=output, stdout=subprocess.PIPE)

    @property
    def fd(self) -> int:
        """What to wait for: the pipe, or, when that has ended, the end of the process; -1 where nothing tells."""
        assert self.child is not None and self.child.stdout is not None
        return self.child.pidfd if self._closed else self.child.stdout.fileno()

    def turn(self, terminal: Terminal) -> None:
        """Read what there is; StartError when the process has failed."""
        assert self.child is not None and self.child.stdout is not None
        if not self._closed:
            data = os.read(self.child.stdout.fileno(), MAX_LINE_BYTES)
            if data:
                self._show(data, terminal)
                return
            self._closed = True
        code = self.child.ended()
        if code is not None:
            self._end(code)

    def _show(self, data: bytes, terminal: Terminal) -> None:
        *lines, rest = (self._rest + data).split(b"\n")
        self._rest = rest[-MAX_LINE_BYTES:]
        for self._last in lines:
            shown = _field(self._last, "phase")
            if shown and shown != self._phase:
                self._phase = shown
                terminal.progress(f"{self.source.name}: {shown}")

    def _end(self, code: int) -> None:
        assert self.child is not None
        path = _field(self._last, "path")
        if code == 0 and path:
            self.result = Path(path), Path(_field(self._last, "tokenizer") or path)
            return
        words = self.child.last_words()
        if code in (CONFIG, MODEL_LOAD, MEMORY) and words:
            raise StartError(code, words[-1])
        raise StartError(MODEL_LOAD, f"Preparing the model '{self.source.name}' failed ({describe_exit(code)})"
                         + (f": {words[-1]}" if words else "."))


def prepare_all(models: Sequence[Served], log_dir: Path, signals: Signals, terminal: Terminal) -> list[tuple[Path, Path]]:
    """(directory of the weights, directory of the tokenizer) of each model; they are prepared side by side."""
    each: list[Preparation] = []
    try:
        for number, model in enumerate(models):
            each.append(Preparation(
                model.source, model.settings["tokenizer"], trust_remote_code=model.settings["trust_remote_code"],
                null=model.settings["null_engine"] is not None,
                output=log_dir / ("prepare.out" if len(models) == 1 else f"prepare.{number}.out")))
        return follow(each, signals, terminal)
    finally:
        for one in each:
            if one.child is not None:
                one.child.destroy()


def follow(each: Sequence[Preparation], signals: Signals, terminal: Terminal) -> list[tuple[Path, Path]]:
    """Wait for all; Stopped when a signal asks for the end, StartError for the first that fails."""
    while waiting := [one for one in each if one.result is None]:
        places = [(one, one.fd) for one in waiting]
        ready = select.select([signals.fd, *(fd for _, fd in places if fd >= 0)], [], [], 0.1)[0]
        signals.clear()
        if any(number in (signal.SIGTERM, signal.SIGINT) for number in signals.take()):
            raise Stopped
        for one, fd in places:
            if fd in ready or fd < 0:
                one.turn(terminal)
    return [one.result for one in each if one.result is not None]


def _field(line: bytes, name: str) -> str:
    """A text field of a JSON line; '' where there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return ""
    text = value.get(name) if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""
