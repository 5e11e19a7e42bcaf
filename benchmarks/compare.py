"""Quartet, in one or several variants, and a peer in turns on the same machine, and the table of ratios.

All servers are started, one after the other, and then asked in turns, one at a time: a level of load to each, then the
next level, `--repeat` times over, each time with prompts of its own. So a ratio is of two runs that lie a minute apart,
and a host that is slow for a while is slow for both; the table has the medians of the figures and of the ratios. The
peer is stopped (SIGSTOP) while it is not asked; ours wait, and what they take meanwhile is printed. The load generator
is ``--load`` (by default our own; give a script that takes --url --model --concurrency --seed --json for another). With
``--prefix`` also: a system prompt that 16 chats share, time to first token of the first and of the others. Answers are
printed: compare them before speeds.

    python -m benchmarks.compare --model DIR --ours "bf16:" --ours "int8:--quantization int8" \\
        --peer "../shared/peers/vllm-cpu serve /opt/vllm DIR {port}"
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field

import psutil

from benchmarks.load import one, prompt

NAMES = {"out_tok_s": "output tokens/s", "ttft_ms": "time to first token, ms", "per_token_ms": "ms per token",
         "gap_p99_ms": "p99 gap, ms"}
FOREIGN = {"concurrency": "streams", "ttft_ms_p50": "ttft_ms", "tpot_ms_p50": "per_token_ms", "itl_ms_p99": "gap_p99_ms"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Side:
    """A server of the comparison. `runs`: of each level, the figures of every repeat."""

    name: str
    command: list[str]
    env: dict[str, str]
    ours: bool
    port: int = field(default_factory=free_port)
    pid: int = 0
    runs: dict[int, list[dict[str, float]]] = field(default_factory=dict)
    idle: list[tuple[float, float]] = field(default_factory=list)   # seconds of waiting, of the processor's time in them

    @contextlib.contextmanager
    def running(self, limit_s: float) -> Iterator[float]:
        """Run the server until the block ends; gives the seconds from the command to healthy."""
        start = time.perf_counter()
        log = open(f"/tmp/quartet-compare-{self.port}.log", "wb")
        command = [part.replace("{port}", str(self.port)) for part in self.command]
        process = subprocess.Popen(command, env={**os.environ, **self.env}, stdout=log, stderr=log, start_new_session=True)
        self.pid = process.pid
        try:
            while not healthy(self.port):
                if process.poll() is not None or time.perf_counter() - start > limit_s:
                    raise SystemExit(f"{command[0]} did not become healthy: see {log.name}")
                time.sleep(0.05)
            yield time.perf_counter() - start
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGCONT)
                os.killpg(process.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(40)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            log.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Others are asked until the block ends."""
        if self.ours:
            start, before = time.perf_counter(), self._processor_s()
            yield
            self.idle.append((time.perf_counter() - start, self._processor_s() - before))
            return
        os.killpg(self.pid, signal.SIGSTOP)
        yield
        os.killpg(self.pid, signal.SIGCONT)

    def _processor_s(self) -> float:
        top = psutil.Process(self.pid)
        return sum(sum(process.cpu_times()[:2]) for process in (top, *top.children(recursive=True)))


def healthy(port: int) -> bool:
    with contextlib.suppress(OSError, urllib.error.URLError):
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
            return bool(answer.status == 200)
    return False


def answer(port: int, model: str) -> str:
    """What the server says about France: compare answers before speeds."""
    body = {"model": model, "temperature": 0, "max_tokens": 16,
            "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as got:
        return str(json.load(got)["choices"][0]["message"]["content"])


def load(side: Side, generator: str, streams: int, seed: int) -> None:
    """One level of load."""
    command = [*shlex.split(generator), "--concurrency"]
    if not generator:
        command = [sys.executable, "-m", "benchmarks.load", "--streams"]
    command += [str(streams), "--seed", str(seed), "--json", "--url", f"http://127.0.0.1:{side.port}", "--model", "m"]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    row = (json.loads(out) if out.lstrip().startswith("[") else [json.loads(out)])[0]
    row = {FOREIGN.get(k, k): v for k, v in row.items()}
    if row.get("failed") or "out_tok_s" not in row:
        raise SystemExit(f"requests failed: {row}")
    side.runs.setdefault(streams, []).append(row)
    print(f"{side.name}: {streams} streams: " + ", ".join(f"{title} {row[figure]:g}" for figure, title in NAMES.items()),
          flush=True)


async def shared_prefix(port: int, model: str, words: int) -> tuple[float, float, float]:
    """16 chats under one system prompt: ms to the first token of the first, and the median of those after it, of the
    first half of them one by one and of the rest all at once."""
    rng = random.Random(words)
    system = prompt(rng, words)
    bodies: list[dict[str, object]] = [
        {"model": model, "stream": True, "temperature": 0, "max_tokens": 8,
         "messages": [{"role": "system", "content": system}, {"role": "user", "content": prompt(rng, 8)}]}
        for _ in range(16)]

    async def first_token(body: dict[str, object]) -> float:
        result = await one("127.0.0.1", port, body, "/v1/chat/completions", "none")
        if result.error:
            raise SystemExit(f"a request failed: {result.error}")
        return 1e3 * result.stamps[0]
    first = await first_token(bodies[0])
    alone = [await first_token(body) for body in bodies[1:8]]
    together = await asyncio.gather(*map(first_token, bodies[8:]))
    return first, statistics.median(alone), statistics.median(together)


def table(sides: list[Side]) -> str:
    """Markdown: a column for each side and, of ours, one for its ratio to the peer's."""
    ours, peers = [side for side in sides if side.ours], [side for side in sides if not side.ours]
    head = ["streams", "figure", *(side.name for side in sides), *(f"{o.name} / {p.name}" for o in ours for p in peers)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for streams in ours[0].runs:
        for figure, title in NAMES.items():
            runs = {side.name: [run[figure] for run in side.runs[streams]] for side in sides}
            row = [f"{statistics.median(many):g}" for many in runs.values()]
            row += [f"{statistics.median(a / b for a, b in zip(runs[o.name], runs[p.name])):.2f}" for o in ours for p in peers]
            lines.append(f"| {streams} | {title} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="directory or file to serve")
    made.add_argument("--peer", default="", help="command of the peer, with {port}; it serves the model under the name m")
    made.add_argument("--peer-name", default="peer")
    made.add_argument("--peer-env", default="", help="NAME=VALUE,... for the peer")
    made.add_argument("--ours", action="append", help="NAME:further flags for quartet serve; may be repeated")
    made.add_argument("--streams", default="1,8,32")
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--prefix", type=int, default=0, help="words of a shared system prompt; 0: leave that out")
    made.add_argument("--load", default="", help="another load generator")
    made.add_argument("--limit", type=float, default=400, help="seconds to become healthy")
    args = made.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # a time limit must not leave a server behind
    sides: list[Side] = []
    for variant in args.ours or ["Quartet:"]:
        name, _, flags = variant.partition(":")
        sides.append(Side(name, [sys.executable, "-m", "pipeline", "serve", args.model, "--served-model-name", "m", "--port",
                                 "{port}", *shlex.split(flags)], {}, True))
    if args.peer:
        env = dict(pair.split("=", 1) for pair in args.peer_env.split(",") if pair)
        sides.append(Side(args.peer_name, shlex.split(args.peer), env, False))
    with contextlib.ExitStack() as servers:
        for side in sides:
            ready_s = servers.enter_context(side.running(args.limit))
            print(f"{side.name}: ready in {ready_s:.1f} s; says: {answer(side.port, 'm')!r}", flush=True)
        for repeat in range(args.repeat):
            for streams in map(int, args.streams.split(",")):
                for side in sides:
                    with alone(side, sides):
                        load(side, args.load, streams, args.seed + 100 * repeat)
        for side in sides if args.prefix else ():
            with alone(side, sides):
                first, one_by_one, together = asyncio.run(shared_prefix(side.port, "m", args.prefix))
            print(f"{side.name}: a prefix of {args.prefix} words: first token after {first:.0f} ms; with it in the cache "
                  f"{one_by_one:.0f} ms ({one_by_one / first:.3f}), eight at once {together:.0f} ms ({together / first:.3f})",
                  flush=True)
    print("\n" + table(sides))
    for side in sides:
        if side.idle:
            print(f"{side.name} took {sum(used for _, used in side.idle):.1f} s of the processor in "
                  f"{sum(seconds for seconds, _ in side.idle):.0f} s of waiting.")


@contextlib.contextmanager
def alone(side: Side, sides: list[Side]) -> Iterator[None]:
    """All but one of the servers wait."""
    with contextlib.ExitStack() as others:
        for other in sides:
            if other is not side:
                others.enter_context(other.waiting())
        yield


if __name__ == "__main__":
    main()
