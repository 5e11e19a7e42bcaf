"""Quartet, in one or several variants, and a peer in turn on the same machine, and the table of ratios.

One server at a time; every level is run `--repeat` times per server, each time with prompts of its own, and the median
is taken. The load generator is ``--load`` (by default our own; give a script that takes --url --model --concurrency
--seed --json for another). With ``--prefix`` also: a system prompt that 16 chats share, time to first token of the first
and of the others. Answers are printed: compare them before speeds.

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

from benchmarks.load import one, prompt

NAMES = {"out_tok_s": "output tokens/s", "ttft_ms": "time to first token, ms", "per_token_ms": "ms per token",
         "gap_p99_ms": "p99 gap, ms"}
FOREIGN = {"concurrency": "streams", "ttft_ms_p50": "ttft_ms", "tpot_ms_p50": "per_token_ms", "itl_ms_p99": "gap_p99_ms"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def server(command: list[str], port: int, env: dict[str, str], limit_s: float) -> Iterator[float]:
    """Run a server until the block ends; gives the seconds from the command to healthy."""
    start = time.perf_counter()
    log = open(f"/tmp/quartet-compare-{port}.log", "wb")
    process = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log, start_new_session=True)
    try:
        while True:
            if process.poll() is not None or time.perf_counter() - start > limit_s:
                raise SystemExit(f"{command[0]} did not become healthy: see {log.name}")
            with contextlib.suppress(OSError, urllib.error.URLError):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                    if answer.status == 200:
                        break
            time.sleep(0.05)
        yield time.perf_counter() - start
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(40)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def answer(port: int, model: str) -> str:
    """What the server says about France: compare answers before speeds."""
    body = {"model": model, "temperature": 0, "max_tokens": 16,
            "messages": [{"role": "user", "content": "What is the capital of France?"}]}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode(),
                                     {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as got:
        return str(json.load(got)["choices"][0]["message"]["content"])


def measure(args: argparse.Namespace, port: int, model: str) -> dict[int, dict[str, float]]:
    """streams -> figure -> median over the repeats."""
    rows: dict[int, list[dict[str, float]]] = {}
    for repeat in range(args.repeat):
        if args.load:
            command = [*shlex.split(args.load), "--concurrency", args.streams, "--json"]
        else:
            command = [sys.executable, "-m", "benchmarks.load", "--streams", args.streams, "--json"]
        command += ["--seed", str(args.seed + 100 * repeat)]
        out = subprocess.run([*command, "--url", f"http://127.0.0.1:{port}", "--model", model], check=True,
                             capture_output=True, text=True).stdout
        parsed = json.loads(out) if out.lstrip().startswith("[") else [json.loads(line) for line in out.splitlines()]
        for row in parsed:
            row = {FOREIGN.get(k, k): v for k, v in row.items()}
            if row.get("failed") or "out_tok_s" not in row:
                raise SystemExit(f"requests failed: {row}")
            rows.setdefault(int(row["streams"]), []).append(row)
            print(f"  run {repeat + 1}: {row['streams']} streams: "
                  + ", ".join(f"{title} {row[figure]:g}" for figure, title in NAMES.items()), flush=True)
    return {streams: {name: statistics.median(r[name] for r in many) for name in NAMES} for streams, many in rows.items()}


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


def table(sides: list[str], results: dict[str, dict[int, dict[str, float]]], peer: str) -> str:
    """Markdown: a column for each side and, of ours, one for its ratio to the peer's."""
    ours = [side for side in sides if side != peer]
    ratios = ours if peer in results else []
    head = ["streams", "figure", *sides, *(f"{side} / {peer}" for side in ratios)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for streams in results[ours[0]]:
        for figure, title in NAMES.items():
            row = [f"{results[side][streams][figure]:g}" for side in sides]
            row += [f"{results[side][streams][figure] / results[peer][streams][figure]:.2f}" for side in ratios]
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
    results: dict[str, dict[int, dict[str, float]]] = {}
    sides: list[tuple[str, list[str], dict[str, str]]] = []
    for variant in args.ours or ["Quartet:"]:
        name, _, flags = variant.partition(":")
        sides.append((name, [sys.executable, "-m", "pipeline", "serve", args.model, "--served-model-name", "m", "--port",
                             "{port}", *shlex.split(flags)], {}))
    if args.peer:
        env = dict(pair.split("=", 1) for pair in args.peer_env.split(",") if pair)
        sides.append((args.peer_name, shlex.split(args.peer), env))
    for name, command, env in sides:
        port = free_port()
        with server([part.replace("{port}", str(port)) for part in command], port, env, args.limit) as ready_s:
            print(f"{name}: ready in {ready_s:.1f} s; says: {answer(port, 'm')!r}", flush=True)
            results[name] = measure(args, port, "m")
            for streams, row in results[name].items():
                print(f"{name}: {streams} streams: " + ", ".join(f"{NAMES[k]} {v:g}" for k, v in row.items()), flush=True)
            if args.prefix:
                first, alone, together = asyncio.run(shared_prefix(port, "m", args.prefix))
                print(f"{name}: a prefix of {args.prefix} words: first token after {first:.0f} ms; with it in the cache "
                      f"{alone:.0f} ms ({alone / first:.3f}), eight at once {together:.0f} ms ({together / first:.3f})",
                      flush=True)
    print("\n" + table([name for name, _, _ in sides], results, args.peer_name))


if __name__ == "__main__":
    main()
