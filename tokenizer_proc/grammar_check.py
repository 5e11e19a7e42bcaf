"""`python -m tokenizer_proc.grammar_check PID`: checks grammars one after another, for the tokenizer with that process id.

A process of its own, because the compiler of grammars is native code that somebody else's text drives: one that
overflows its stack, eats memory or does not end costs this process and its own request. The stack here is smaller than
any on which the engine works with a grammar that passed. Reads and writes frames: four bytes of length, then UTF-8.
"""
from __future__ import annotations

import os
import resource
import struct
import sys
import threading
from typing import IO, Any

from llguidance import LLMatcher, LLParserLimits

from pipeline.grammars import LIMITS
from pipeline.parent import die_with

STACK_BYTES = 16 * 2**20
MEMORY_BYTES = 2 * 2**30
NOT_COMPILED = "it cannot be compiled"


def check(text: str) -> str:
    """What the library finds wrong with a grammar, in one line; "" for a good one."""
    try:
        complaint = LLMatcher.validate_grammar(text, None, limits=LLParserLimits(**dict[str, Any](LIMITS)))
    except BaseException:                     # the library turns a panic into a BaseException
        return NOT_COMPILED
    if not complaint or complaint.startswith("WARNING"):
        return ""
    lines = [line.strip() for line in complaint.splitlines() if line.strip(" |^")]
    last = lines[-1].removeprefix("error: ") if lines and lines[0].startswith("regex parse error") else lines[0]
    return "".join(char if char.isprintable() else " " for char in last)[:200].rstrip(".") or NOT_COMPILED


def frame(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<I", len(data)) + data


def read_frame(stream: IO[bytes]) -> str | None:
    """The next text; None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = struct.unpack("<I", head)[0]
    data = stream.read(size)
    return data.decode() if len(data) == size else None


def serve() -> None:
    while (text := read_frame(sys.stdin.buffer)) is not None:
        sys.stdout.buffer.write(frame(check(text)))
        sys.stdout.buffer.flush()
    os._exit(0)


if __name__ == "__main__":
    die_with(int(sys.argv[1]))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    worker = threading.Thread(target=serve)
    worker.start()
    worker.join()
