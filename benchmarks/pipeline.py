"""What the pipeline costs without a model: streamed tokens per CPU second of each process, over HTTP and over ZeroMQ.

The null engine answers at once, so frontend, tokenizer and detokenizer are what is measured. CPU time is read from
/proc, so that the load generator, which shares the cores, does not count. What a process carries on a core of its own is
what each further one of its kind adds.

    python -m benchmarks.pipeline --streams 64 --tokens 256 --frontends 1,2
"""
from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.compare import Side, free_port
from pipeline.client import AsyncClient

STAGES = {"frontend": "frontend", "tokenizer_proc": "tokenizer", "engine_proc": "engine", "detok_proc": "detokenizer"}


def cpu_seconds(run_dir: str) -> dict[str, float]:
    """stage -> user and system time of its processes so far."""
    found = dict.fromkeys(STAGES.values(), 0.0)
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_text().split("\0")
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if "-m" in command and any(part.startswith(run_dir) for part in command):
                stage = STAGES.get(command[command.index("-m") + 1])
                if stage is not None:
                    found[stage] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


async def over_zmq(endpoint: str, frontends: int, streams: int, tokens: int, rounds: int) -> int:
    """The same work through the in-cluster client; output tokens received."""
    total = 0
    clients = [AsyncClient(f"{endpoint}.{i}") for i in range(frontends)]
    for client in clients:
        await client.connect()

    async def worker(number: int) -> None:
        nonlocal total
        for round_ in range(rounds):
            stream = await clients[number % frontends].stream_completions(
                model="null", prompt=f"{number} {round_} " * 50, max_tokens=tokens, ignore_eos=True, temperature=0)
            async for delta in stream:
                total += len(delta.token_ids)
    await asyncio.gather(*(worker(n) for n in range(streams)))
    for client in clients:
        await client.close()
    return total


def report(name: str, tokens: int, wall: float, before: dict[str, float], after: dict[str, float]) -> None:
    used = {stage: after[stage] - before[stage] for stage in before}
    text = sum(used[stage] for stage in used if stage != "engine")
    parts = ", ".join(f"{stage} {1e6 * seconds / tokens:.1f}" for stage, seconds in used.items())
    print(f"{name}: {tokens} tokens in {wall:.1f} s; microseconds of CPU per token: {parts}; the three text processes "
          f"carry {tokens / text:,.0f} tokens per second of one core; on a core of its own each frontend carries "
          f"{tokens / used['frontend']:,.0f}, each detokenizer {tokens / used['detokenizer']:,.0f}", flush=True)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--streams", type=int, default=64)
    made.add_argument("--tokens", type=int, default=256)
    made.add_argument("--rounds", type=int, default=4)
    made.add_argument("--frontends", default="1", help="how many frontend processes: a row for each number, 1,2 for instance")
    made.add_argument("--step", type=float, default=0.0, help="least seconds of a step: 0.01 is a fast model's pace")
    args = made.parse_args()
    for frontends in map(int, args.frontends.split(",")):
        measure(args, frontends)


def measure(args: argparse.Namespace, frontends: int) -> None:
    """One server with so many frontends: the rows of its HTTP and of its ZeroMQ side."""
    with tempfile.TemporaryDirectory(prefix="qb-") as root:
        port, endpoint, title = free_port(), f"ipc://{root}/door", f"{frontends} frontend{'s' * (frontends > 1)}"
        command = [sys.executable, "-m", "pipeline", "serve", "--null-engine", "count", "--served-model-name", "null",
                   "--port", str(port), "--frontends", str(frontends), "--zmq-endpoint", endpoint, "--max-num-seqs",
                   str(args.streams), "--null-step", str(args.step), "--num-kv-blocks", "20000"]
        with Side("ours", command, {"XDG_RUNTIME_DIR": root}, True, port).running(60):
            before, start = cpu_seconds(root), time.perf_counter()
            subprocess.run([sys.executable, "-m", "benchmarks.load", "--url", f"http://127.0.0.1:{port}", "--model", "null",
                            "--streams", str(args.streams), "--rounds", str(args.rounds), "--tokens", str(args.tokens),
                            "--words", "50"], check=True)
            tokens = args.streams * args.rounds * args.tokens + args.tokens
            report(f"{title}, HTTP", tokens, time.perf_counter() - start, before, cpu_seconds(root))
            before, start = cpu_seconds(root), time.perf_counter()
            tokens = asyncio.run(over_zmq(endpoint, frontends, args.streams, args.tokens, args.rounds))
            report(f"{title}, ZeroMQ", tokens, time.perf_counter() - start, before, cpu_seconds(root))


if __name__ == "__main__":
    main()
