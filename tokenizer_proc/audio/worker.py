"""`python -m tokenizer_proc.audio.worker PARENT`: decodes recordings for a tokenizer that must not be hurt by them.

Reads commands from its standard input and answers each on its standard output, in order (see protocol.py). Has limits of
memory, of processor time for each command, and no way to write a file. It may die at any time: its tokenizer starts
another one and tells the caller whose file did it.
"""
from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pipeline.parent import die_with

MEMORY = 2 * 2**30                   # bytes of address space, libraries (0.65 GB) included
SECONDS = 60                         # of processor time for one command
FILES = 256


def limit() -> None:
    """Set what does not change, before any library is loaded."""
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, FILES))


def allow_seconds() -> None:
    """SIGXCPU ends the process when the next command takes too long."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + SECONDS, hard))


def main() -> None:
    die_with(int(sys.argv[1]))
    limit()
    from tokenizer_proc.audio.decode import RATE, BadAudio, samples
    from tokenizer_proc.audio.features import LogMel, Raw, extractor
    from tokenizer_proc.audio.protocol import Command, read_command, write_bad, write_window
    from tokenizer_proc.audio.split import Piece, pieces

    @dataclass(slots=True)
    class Job:
        pieces: Iterator[Piece]
        features: LogMel | Raw

    jobs: dict[int, Job] = {}
    extractors: dict[str, LogMel | Raw] = {}

    def serve(command: Command, out: BinaryIO) -> None:
        if command.op == "close":
            jobs.pop(command.job, None)
            return
        try:
            if command.op == "open":
                if command.model not in extractors:
                    extractors[command.model] = extractor(Path(command.model))
                chunks = samples(Path(command.path), command.max_seconds)
                jobs[command.job] = Job(pieces(chunks), extractors[command.model])
                return
            job = jobs[command.job]
            piece = next(job.pieces)
            features = None if command.skip else job.features(piece.samples)
            write_window(out, command.job, piece.index, piece.last, piece.start / RATE, len(piece.samples) / RATE, features)
            if piece.last:
                del jobs[command.job]
        except BadAudio as error:
            jobs.pop(command.job, None)
            write_bad(out, command.job, str(error))
        except MemoryError:
            jobs.pop(command.job, None)
            write_bad(out, command.job, "The audio file needs more memory than this server grants for decoding.")
        except Exception:                                # the libraries raise whatever they like at hostile bytes
            jobs.pop(command.job, None)
            write_bad(out, command.job, "The audio file is damaged: it cannot be decoded.")

    commands, out = sys.stdin.buffer, sys.stdout.buffer
    while (command := read_command(commands)) is not None:
        allow_seconds()
        serve(command, out)


if __name__ == "__main__":
    main()
