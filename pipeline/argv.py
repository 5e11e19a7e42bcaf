"""Overwrites secrets in this process's own command line, which every user of the machine can read with `ps`.

Best effort on Linux: the window until it runs stays, so that QUARTET_API_KEY and --api-key-file are the better way.
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from pathlib import Path

ARG_START, ARG_END = 48, 49          # fields of /proc/self/stat, counted from 1


def hide(secrets: Iterable[str]) -> None:
    """Replace each secret in the kernel's copy of the arguments by asterisks of the same length."""
    wanted = [secret.encode() for secret in secrets if secret]
    if not wanted:
        return
    try:
        fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
        start, end = (int(fields[number - 3]) for number in (ARG_START, ARG_END))     # state is field 3
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return
    if not 0 < start < end or end - start != len(shown):
        return
    position = 0
    for argument in shown.split(b"\0"):
        for secret in wanted:
            if argument == secret or argument.endswith(b"=" + secret):
                ctypes.memset(start + position + len(argument) - len(secret), ord("*"), len(secret))
        position += len(argument) + 1
