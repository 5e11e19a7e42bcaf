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

from pipeline.checkpoint import Source, cache_root
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MEMORY, MODEL_LOAD
from pipeline.procs import Child, describe_exit, environment
from pipeline.signals import Signals
from pipeline.terminal import Terminal

MAX_LINE_BYTES = 64 * 1024


class Stopped(Exception):
    """A signal asked for the end while the checkpoint was prepared."""


def prepare(source: Source, tokenizer: str | None, *, trust_remote_code: bool, null: bool, output: Path,
            signals: Signals, terminal: Terminal, command: Sequence[str] | None = None) -> tuple[Path, Path]:
    """(directory of the weights, directory of the tokenizer). `output` takes what the process prints.

    null: no weights are needed, so a directory with a tokenizer.json is taken as it is.
    """
    chosen = None if tokenizer is None else Path(tokenizer).expanduser().absolute()
    if chosen is not None and not chosen.is_dir():
        raise StartError(CONFIG, f"There is no tokenizer directory '{tokenizer}'.")
    home = chosen if chosen is not None else Path(source.where) if source.is_directory else None
    if null and home is not None and (home / "tokenizer.json").is_file():
        return Path(source.where) if source.is_directory else home, home
    if command is None:
        command = [sys.executable, "-m", "pipeline.parent", str(os.getpid()), "engine_proc.prepare", "--source",
                   source.where, "--out-root", str(cache_root())]
        command = [*command, "--tokenizer", str(chosen)] if chosen is not None else command
        command = [*command, "--trust-remote-code"] if trust_remote_code else command
    child = Child(command, environment=environment(one_thread=False), output=output, stdout=subprocess.PIPE)
    try:
        return _follow(child, source, signals, terminal)
    finally:
        child.destroy()


def _follow(child: Child, source: Source, signals: Signals, terminal: Terminal) -> tuple[Path, Path]:
    """Show the phases that the process reports, and return what its last line says."""
    assert child.stdout is not None
    pipe, rest, phase, last = child.stdout.fileno(), b"", "", b""
    while True:
        if not _wait(pipe, signals):
            continue
        data = os.read(pipe, MAX_LINE_BYTES)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        rest = rest[-MAX_LINE_BYTES:]
        for last in lines:
            shown = _field(last, "phase")
            if shown and shown != phase:
                phase = shown
                terminal.progress(f"{source.name}: {phase}")
    while (code := child.ended()) is None:
        _wait(child.pidfd, signals)
    path = _field(last, "path")
    if code == 0 and path:
        return Path(path), Path(_field(last, "tokenizer") or path)
    words = child.last_words()
    if code in (CONFIG, MODEL_LOAD, MEMORY) and words:
        raise StartError(code, words[-1])
    raise StartError(MODEL_LOAD, f"Preparing the model '{source.name}' failed ({describe_exit(code)})"
                     + (f": {words[-1]}" if words else "."))


def _wait(fd: int, signals: Signals) -> bool:
    """Wait a tenth of a second for `fd` (-1: none); whether it is readable. Stopped when a signal asks for the end."""
    ready = select.select([signals.fd, *([fd] if fd >= 0 else [])], [], [], 0.1)[0]
    signals.clear()
    if any(number in (signal.SIGTERM, signal.SIGINT) for number in signals.take()):
        raise Stopped
    return fd in ready


def _field(line: bytes, name: str) -> str:
    """A text field of a JSON line; '' where there is none."""
    try:
        value = json.loads(line)
    except ValueError:
        return ""
    text = value.get(name) if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""
