"""Load any OpenAI-compatible server over loopback and print one row per number of streams.

Streaming completions over raw sockets with as little client work as possible, because on a small machine the client
competes with the server: a chunk costs a search for ``data:`` and, only where text must be counted, no JSON at all.

    python -m benchmarks.load --url http://127.0.0.1:8000 --model m --streams 1,8,32
"""
from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

WORDS = ("river stone garden letter window bridge candle forest market winter harbour mirror season planet engine copper "
         "summer village painter silver thunder meadow captain journey kitchen library mountain morning orange paper "
         "signal shadow teacher theatre travel valley violin weather yellow").split()
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(slots=True)
class Result:
    """One request: times in seconds since its start."""

    stamps: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""


def prompt(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def one(host: str, port: int, body: dict[str, object], path: str, key: str) -> Result:
    """Send one streaming request and note when each event arrived."""
    result, start = Result(), time.perf_counter()
    data = json.dumps(body).encode()
    try:
        reader, writer = await asyncio.open_connection(host, port, limit=2**22)
    except OSError as error:
        result.error = str(error)
        return result
    head = (f"POST {path} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n")
    last_event = b""
    try:
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            result.error = status.decode(errors="replace").strip() + " " + (await reader.read(2000)).decode(errors="replace")
            return result
        async for line in reader:
            if line.startswith(b"data:") and b"[DONE]" not in line:
                if b'"choices":[]' not in line and b'"choices": []' not in line:
                    result.stamps.append(time.perf_counter() - start)
                last_event = line
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        result.error = repr(error)
    finally:
        writer.close()
    result.end = time.perf_counter() - start
    try:
        usage = json.loads(last_event[5:]).get("usage") or {}
    except ValueError:
        usage = {}
    result.completion_tokens = usage.get("completion_tokens", len(result.stamps))
    result.prompt_tokens = usage.get("prompt_tokens", 0)
    if not result.stamps and not result.error:
        result.error = "no text"
    return result


async def level(args: argparse.Namespace, streams: int) -> dict[str, float | int | str]:
    """`streams` workers, `rounds` requests each, after one request that is not counted."""
    url = urlsplit(args.url)
    assert url.hostname in LOOPBACK, "load goes to loopback addresses only"
    rng = random.Random(args.seed * 1000 + streams)
    path = "/v1/chat/completions" if args.chat else "/v1/completions"

    def body() -> dict[str, object]:
        text = prompt(rng, args.words)
        made: dict[str, object] = {"model": args.model, "stream": True, "temperature": args.temperature, "ignore_eos": True,
                                   "max_tokens": args.tokens, "stream_options": {"include_usage": True}}
        return made | ({"messages": [{"role": "user", "content": text}]} if args.chat else {"prompt": text})
    todo = iter([body() for _ in range(max(args.least, streams * args.rounds))])
    await one(url.hostname, url.port or 80, body(), path, args.key)
    results: list[Result] = []

    async def worker() -> None:
        for request in todo:
            results.append(await one(url.hostname, url.port or 80, request, path, args.key))
    start = time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(streams)))
    wall = time.perf_counter() - start
    good = [r for r in results if not r.error]
    row: dict[str, float | int | str] = {"streams": streams, "requests": len(good), "failed": len(results) - len(good)}
    if not good:
        return row | {"error": results[0].error[:200]}
    gaps = sorted(b - a for r in good for a, b in zip(r.stamps, r.stamps[1:])) or [0.0]
    return row | {
        "out_tok_s": round(sum(r.completion_tokens for r in good) / wall, 1),
        "ttft_ms": round(1e3 * statistics.median(r.stamps[0] for r in good), 1),
        "per_token_ms": round(1e3 * statistics.median(
            (r.stamps[-1] - r.stamps[0]) / max(1, r.completion_tokens - 1) for r in good), 2),
        "gap_p99_ms": round(1e3 * gaps[int(0.99 * (len(gaps) - 1))], 1)}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--url", required=True)
    made.add_argument("--model", required=True)
    made.add_argument("--streams", default="1,8,32")
    made.add_argument("--words", type=int, default=200)
    made.add_argument("--tokens", type=int, default=128)
    made.add_argument("--rounds", type=int, default=3, help="requests per stream")
    made.add_argument("--least", type=int, default=5, help="requests at least")
    made.add_argument("--temperature", type=float, default=0.0)
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--key", default="none")
    made.add_argument("--chat", action="store_true")
    made.add_argument("--json", action="store_true")
    return made


def main() -> None:
    args = parser().parse_args()
    for streams in (int(s) for s in args.streams.split(",")):
        row = asyncio.run(level(args, streams))
        print(json.dumps(row) if args.json else "  ".join(f"{k}={v}" for k, v in row.items()), flush=True)


if __name__ == "__main__":
    main()
