"""What constrained neighbours cost free streams: decode steps with all streams free, and with half of them constrained.

Drives the real engine in one process, as benchmarks.step does, several rounds in turn. Print it on a quiet machine.

    python -m benchmarks.constrained --model ~/.cache/quartet/SmolLM2... --streams 8,32
"""
from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from tokenizers import Tokenizer

from benchmarks.step import load
from engine_proc.core import EngineCore
from pipeline import grammars
from pipeline.config import EngineConfig
from pipeline.messages import Add, Adds, Route, pack_ids
from pipeline.params import DetokSpec, Grammar, SamplingParams
from tokenizer_proc.grammar import compiled

# An answer that does not end by itself: the model is asked for list after list of records.
SCHEMA = {"type": "array", "minItems": 1000, "items": {
    "type": "object", "additionalProperties": False, "required": ["name", "age", "tags"], "properties": {
        "name": {"type": "string"}, "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "maxItems": 3}}}}


def step_s(core: EngineCore, first: int, streams: int, constrained: int, grammar: Grammar, steps: int) -> float:
    """The median decode step with `streams` greedy streams, of which `constrained` follow `grammar`."""
    adds = []
    for i in range(streams):
        sampling = SamplingParams(temperature=0.0, max_tokens=steps + 60, ignore_eos=True)
        if i < constrained:
            sampling.grammar = grammar
        ids = pack_ids([(j * 7 + i * 31) % 40_000 + 10 for j in range(32)])
        adds.append(Add((first + i) << 8, Route(0, 1, 0, 1, 0, 1), 1, 0, ids, b"", sampling, DetokSpec(), 0, 0, b""))
    core.handle(Adds(adds))
    while core.load().waiting or any(seq.num_output < 4 for seq in core.sequences.values()):
        core.turn()
    spent = []
    for _ in range(steps):
        start = time.perf_counter()
        core.turn()
        spent.append(time.perf_counter() - start)
    while core.sequences:
        core.turn()
    return median(spent)


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a prepared Hugging Face directory")
    made.add_argument("--streams", default="8,32")
    made.add_argument("--steps", type=int, default=40)
    made.add_argument("--rounds", type=int, default=8)
    args = made.parse_args()
    core = load(args.model, EngineConfig(kv_cache_bytes=2**30))
    core.grammars.prepare()
    tokenizer = Tokenizer.from_file(str(Path(args.model) / "tokenizer.json"))
    grammar = compiled(grammars.json_schema(SCHEMA), tokenizer, [1])
    first = 1
    for streams in (int(s) for s in args.streams.split(",")):
        free, mixed = [], []
        for _ in range(args.rounds):
            for found, constrained in ((free, 0), (mixed, streams // 2)):
                found.append(step_s(core, first, streams, constrained, grammar, args.steps))
                first += streams
        a, b = median(free), median(mixed)
        change = sorted(100 * (one / other - 1) for one, other in zip(free, mixed))
        print(f"{streams} streams: {1e3 * a:.2f} ms a step when all are free, {1e3 * b:.2f} ms when half are constrained; "
              f"a free stream gives {median(change):+.1f} % tokens/s (rounds: {change[0]:+.1f} to {change[-1]:+.1f} %)",
              flush=True)


if __name__ == "__main__":
    main()
