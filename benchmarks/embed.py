"""Embeddings over HTTP, ours and the peers' in turn on the same machine, and the table of ratios.

Throughput: `--callers` connections, each sending batches of 32 texts of 20 to 200 words. Latency: single short texts,
one after another. sentence-transformers runs in a process of its own, without HTTP, at its best batch size; its turns
and ours alternate while the other side rests, so that a noisy machine is noisy for both.

    python -m benchmarks.embed --model DIR --dtype float32 --sentence-transformers /path/to/site-packages \
        --peer "../shared/peers/vllm-cpu serve /opt/vllm DIR {port} --runner pooling"
"""
from __future__ import annotations

import argparse
import base64
import http.client
import json
import math
import random
import shlex
import statistics
import struct
import subprocess
import sys
import threading
import time

from benchmarks.compare import Side
from benchmarks.load import prompt

BATCH, SHORTEST, LONGEST = 32, 20, 200
BATCH_SIZES = (8, 16, 32, 64)
FIGURES = {"texts_s": "texts/s", "single_p50_ms": "single text, p50 ms", "single_p99_ms": "single text, p99 ms"}


def texts(seed: int, count: int) -> list[str]:
    """Texts of 20 to 200 words."""
    rng = random.Random(seed)
    return [prompt(rng, rng.randint(SHORTEST, LONGEST)) for _ in range(count)]


class Caller:
    """One kept-alive connection."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def embed(self, inputs: list[str], model: str = "m") -> list[bytes]:
        """The embeddings as float32 bytes."""
        body = json.dumps({"model": model, "input": inputs, "encoding_format": "base64"})
        self._connection.request("POST", "/v1/embeddings", body, {"content-type": "application/json"})
        answer = self._connection.getresponse()
        data = answer.read()
        if answer.status != 200:
            raise SystemExit(f"the server answered {answer.status}: {data[:300]!r}")
        return [base64.b64decode(item["embedding"]) for item in json.loads(data)["data"]]


def load(port: int, callers: int, batches: int) -> float:
    """Texts per second of `callers` that send `batches` batches each."""
    todo = [[texts(1000 * caller + number, BATCH) for number in range(batches)] for caller in range(callers)]

    def work(mine: list[list[str]]) -> None:
        caller = Caller(port)
        for batch in mine:
            caller.embed(batch)
    threads = [threading.Thread(target=work, args=(mine,)) for mine in todo]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return callers * batches * BATCH / (time.perf_counter() - start)


def singles(port: int, count: int) -> list[float]:
    """Milliseconds of short texts, one after another."""
    caller, rng, taken = Caller(port), random.Random(7), []
    for _ in range(count):
        text = prompt(rng, 8)
        start = time.perf_counter()
        caller.embed([text])
        taken.append(1e3 * (time.perf_counter() - start))
    return sorted(taken)


def measure(port: int, args: argparse.Namespace) -> dict[str, float]:
    singles(port, 5)
    load(port, 1, 1)
    taken = singles(port, args.singles)
    return _row([load(port, args.callers, args.batches) for _ in range(args.repeat)], taken)


def in_process(args: argparse.Namespace) -> None:
    """The side of sentence-transformers: a process that computes one turn for each line it reads."""
    sys.path.append(args.sentence_transformers)
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(args.model, device="cpu", local_files_only=True,
                                model_kwargs={"dtype": getattr(torch, args.dtype)})
    some, rng = texts(0, args.batches * BATCH * 2), random.Random(7)

    def rate(size: int) -> float:
        start = time.perf_counter()
        model.encode(some, batch_size=size)
        return len(some) / (time.perf_counter() - start)
    model.encode(some[:BATCH])
    best = max(BATCH_SIZES, key=rate)
    vector = model.encode([texts(5, 1)[0]], convert_to_numpy=True)[0].astype("float32").tobytes()
    print(json.dumps({"vector": base64.b64encode(vector).decode(), "best": best}), flush=True)
    for _ in sys.stdin:
        taken = []
        for _ in range(args.singles // args.repeat):
            text, start = prompt(rng, 8), time.perf_counter()
            model.encode([text])
            taken.append(1e3 * (time.perf_counter() - start))
        print(json.dumps(_row([rate(best)], taken)), flush=True)


def _row(rates: list[float], taken: list[float]) -> dict[str, float]:
    taken = sorted(taken)
    return {"texts_s": statistics.median(rates), "single_p50_ms": taken[len(taken) // 2],
            "single_p99_ms": taken[int(0.99 * (len(taken) - 1))]}


def alternate(port: int, args: argparse.Namespace) -> tuple[dict[str, float], dict[str, float], bytes]:
    """Ours and sentence-transformers' figures, medians over turns, and its vector."""
    command = [sys.executable, "-m", "benchmarks.embed", "--in-process", *sys.argv[1:]]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None
    try:
        hello = json.loads(child.stdout.readline())
        print(f"sentence-transformers: best batch size {hello['best']}", flush=True)
        ours, theirs = [], []
        for turn in range(args.repeat):
            ours.append(_row([load(port, args.callers, args.batches)], singles(port, args.singles // args.repeat)))
            child.stdin.write("turn\n")
            child.stdin.flush()
            theirs.append(json.loads(child.stdout.readline()))
            print(f"turn {turn + 1}: ours {_line(ours[-1])}; theirs {_line(theirs[-1])}", flush=True)
    finally:
        child.kill()
    middle = [{name: statistics.median(row[name] for row in side) for name in FIGURES} for side in (ours, theirs)]
    return middle[0], middle[1], base64.b64decode(hello["vector"])


def cosine(a: bytes, b: bytes) -> float:
    left, right = (struct.unpack(f"<{len(data) // 4}f", data) for data in (a, b))
    dot = sum(x * y for x, y in zip(left, right, strict=True))
    return dot / math.sqrt(sum(x * x for x in left) * sum(y * y for y in right))


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="directory of an embedding model")
    made.add_argument("--dtype", default="float32")
    made.add_argument("--ours", default="", help="further flags for quartet serve")
    made.add_argument("--peer", default="", help="command of a peer, with {port}; it serves the model under the name m")
    made.add_argument("--sentence-transformers", default="", help="directory that holds the package")
    made.add_argument("--callers", type=int, default=8)
    made.add_argument("--batches", type=int, default=3, help="batches of each caller")
    made.add_argument("--singles", type=int, default=100)
    made.add_argument("--repeat", type=int, default=3)
    made.add_argument("--limit", type=float, default=400, help="seconds to become healthy")
    made.add_argument("--in-process", action="store_true", help=argparse.SUPPRESS)
    args = made.parse_args()
    if args.in_process:
        return in_process(args)
    rows, vectors = {}, {}
    ours = [sys.executable, "-m", "pipeline", "serve", args.model, "--served-model-name", "m", "--dtype", args.dtype,
            "--port", "{port}", *shlex.split(args.ours)]
    for name, command in (("Quartet", ours), ("peer", shlex.split(args.peer))):
        if not command:
            continue
        side = Side(name, command, {}, name == "Quartet")
        port = side.port
        with side.running(args.limit) as ready_s:
            print(f"{name}: ready in {ready_s:.1f} s", flush=True)
            vectors[name] = Caller(port).embed(texts(5, 1))[0]
            if name == "Quartet" and args.sentence_transformers:
                load(port, 1, 1)
                theirs = "sentence-transformers"
                rows[name], rows[theirs], vectors[theirs] = alternate(port, args)
            else:
                rows[name] = measure(port, args)
        print(f"{name}: {_line(rows[name])}", flush=True)
    print("\n| | Quartet | " + " | ".join(f"{name} | ratio" for name in rows if name != "Quartet") + " |")
    print("|---" * (2 * len(rows)) + "|")
    for figure, title in FIGURES.items():
        cells = [f"{row[figure]:.1f} | {rows['Quartet'][figure] / row[figure]:.2f}"
                 for name, row in rows.items() if name != "Quartet"]
        print(f"| {title} | {rows['Quartet'][figure]:.1f} | " + " | ".join(cells) + " |")
    for name, vector in vectors.items():
        if name != "Quartet":
            print(f"cosine with {name}: {cosine(vectors['Quartet'], vector):.6f}")
    return None


def _line(row: dict[str, float]) -> str:
    return ", ".join(f"{title} {row[figure]:.1f}" for figure, title in FIGURES.items())


if __name__ == "__main__":
    main()
