"""How smooth a chat stays while another model of the same server embeds: the gaps between its tokens, without and with.

    python -m benchmarks.beside --chat DIR --embed DIR
"""
from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import multiprocessing.sharedctypes
import sys
import time

from benchmarks.compare import Side, free_port
from benchmarks.embed import BATCH, Caller, texts
from benchmarks.load import level
from benchmarks.load import parser as load_parser


def embed_for_ever(port: int, number: int, done: multiprocessing.sharedctypes.Synchronized[int]) -> None:
    """One caller: batches of 32 texts until it is ended."""
    caller, batches = Caller(port), [texts(100 * number + i, BATCH) for i in range(4)]
    while True:
        for batch in batches:
            caller.embed(batch, "e")
            with done.get_lock():
                done.value += BATCH


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--chat", required=True, help="directory of a chat model")
    made.add_argument("--embed", required=True, help="directory of an embedding model")
    made.add_argument("--callers", type=int, default=8)
    made.add_argument("--streams", type=int, default=1)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=4)
    args = made.parse_args()
    port = free_port()
    command = [sys.executable, "-m", "pipeline", "serve", args.chat, "--served-model-name", "m", "--model", f"e={args.embed}",
               "--port", str(port)]
    options = ["--url", f"http://127.0.0.1:{port}", "--model", "m", "--words", "40", "--tokens", str(args.tokens),
               "--rounds", str(args.rounds)]
    spawn = multiprocessing.get_context("spawn")
    done = spawn.Value("L", 0)
    with Side("ours", command, {}, True, port).running(300):
        while True:                                      # both models must be there
            try:
                Caller(port).embed(["ready?"], "e")
                break
            except SystemExit:
                time.sleep(0.5)
        alone = asyncio.run(level(load_parser().parse_args(options), args.streams))
        callers = [spawn.Process(target=embed_for_ever, args=(port, n, done), daemon=True) for n in range(args.callers)]
        for process in callers:
            process.start()
        while done.value < args.callers * BATCH:
            time.sleep(0.1)
        start, before = time.perf_counter(), done.value
        beside = asyncio.run(level(load_parser().parse_args(options), args.streams))
        rate = (done.value - before) / (time.perf_counter() - start)
        for process in callers:
            process.kill()
    for name, row in (("alone", alone), (f"beside {args.callers} callers", beside)):
        print(f"{name}: " + "  ".join(f"{key}={value}" for key, value in row.items()))
    print(f"texts embedded meanwhile: {rate:.1f} a second")
    print(f"p99 gap: {float(beside['gap_p99_ms']) / float(alone['gap_p99_ms']):.2f} times that without")


if __name__ == "__main__":
    main()
