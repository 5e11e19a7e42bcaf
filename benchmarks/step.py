"""Where the time of an engine step goes: schedule, prepare, model by kind of operation, sample, collect, send.

Drives the real engine (scheduler, runner, sampler) in one process with a sender that throws everything away, after
prompts of `--prompt` tokens, for each batch size. Print it on a quiet machine.

    python -m benchmarks.step --model ~/.cache/quartet/SmolLM2... --streams 1,8,32
"""
from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from engine_proc import sampler
from engine_proc.core import EngineCore
from engine_proc.greedy import Batch, Calls
from engine_proc.loader import load_runner
from pipeline import codec
from pipeline.checkpoint import describe
from pipeline.config import EngineConfig, ModelConfig, ServerConfig
from pipeline.messages import Add, Adds, Route, pack_ids
from pipeline.params import DetokSpec, SamplingParams
from pipeline.transport import Address


class Discard:
    """A sender that encodes, as the real one does, and drops."""

    def send(self, to: Address, message: Any) -> bool:
        codec.encode(message)
        return True

    def pressure(self, to: Address) -> float:
        return 0.0


class Stopwatch:
    """Adds up the time spent in named functions."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        setattr(owner, attribute, self.timed(getattr(owner, attribute), name))

    def timed(self, inner: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[name] += time.perf_counter() - start
        return timed


def load(path: str, engine: EngineConfig) -> EngineCore:
    """The engine of a prepared model, with nobody to hear it."""
    facts = describe(Path(path), Path(path), None)
    model = ModelConfig(names=("m",), path=path, max_model_len=min(2048, facts.max_model_len),
                        vocab_size=facts.vocab_size, eos_ids=facts.eos_ids, engine=engine)
    start = time.perf_counter()
    runner = load_runner(model, lambda phase, percent: None)
    print(f"loaded in {time.perf_counter() - start:.2f} s: {runner.facts}")
    return EngineCore(ServerConfig(run_dir="/", log_dir="/", models=(model,)), 0, 1, runner, Discard(), time.monotonic_ns)


def watch_greedy(runner: Any, watch: Stopwatch) -> None:
    """The parts of steps that do without the model's ordinary calls."""
    bind = runner.model.bind

    def timed(batch: Batch) -> Calls:
        calls = bind(batch)
        return replace(calls, layers=watch.timed(calls.layers, "layers"), head=watch.timed(calls.head, "head"))
    runner.model.bind = timed
    runner.greedy._calls.clear()                # what the self-test bound
    watch.watch(runner.greedy, "prepare", "prepare")


def run(core: EngineCore, watch: Stopwatch, streams: int, prompt: int, steps: int) -> None:
    """One batch size: time of the prefill, then of each decode step by part."""
    core.handle(Adds([Add(
        (streams << 20) + (i << 8), Route(0, 1, 0, 1, 0, 1), 1, 0,
        pack_ids([(j * 7 + i * 31) % 40_000 + 10 for j in range(prompt)]), b"",
        SamplingParams(temperature=0.0, max_tokens=steps + 60, ignore_eos=True), DetokSpec(), 0, 0, b"")
        for i in range(streams)]))
    start = time.perf_counter()
    while core.load().waiting or any(seq.num_output < 2 for seq in core.sequences.values()):
        core.turn()
    prefill = time.perf_counter() - start
    take_times = getattr(core.runner.model, "take_times", dict)
    take_times()
    watch.seconds.clear()
    spent = []
    for _ in range(steps):
        start = time.perf_counter()
        core.turn()
        spent.append(time.perf_counter() - start)
    parts = {name: 1e3 * seconds / steps for name, seconds in watch.seconds.items()}
    rest = 1e3 * sum(spent) / steps - sum(parts.values())
    print(f"{streams} streams: prefill {1e3 * prefill / streams:.1f} ms a prompt ({streams * prompt / prefill:.0f} "
          f"tokens/s); decode step {1e3 * median(spent):.2f} ms (median), {streams / median(spent):.0f} tokens/s", flush=True)
    print("  mean ms: " + ", ".join(f"{name} {ms:.3f}" for name, ms in sorted(parts.items(), key=lambda p: -p[1]))
          + f", rest {rest:.3f}")
    inside = take_times()
    if inside:
        ranked = sorted(inside.items(), key=lambda part: -part[1])
        print("  inside the layers: " + ", ".join(f"{name} {1e3 * seconds / steps:.3f}" for name, seconds in ranked if seconds))
    while core.sequences:
        core.turn()


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", required=True, help="a prepared Hugging Face directory")
    made.add_argument("--streams", default="1,8,32")
    made.add_argument("--prompt", type=int, default=201)
    made.add_argument("--steps", type=int, default=60)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--quantization")
    made.add_argument("--torch", action="store_true", help="without our kernels")
    args = made.parse_args()
    core = load(args.model, EngineConfig(dtype=args.dtype, quantization=args.quantization, kernels=not args.torch,
                                         kv_cache_bytes=2**30))
    runner: Any = core.runner
    watch = Stopwatch()
    watch.watch(core.scheduler, "plan", "schedule")
    watch.watch(core.scheduler, "collect", "collect")
    watch.watch(core.outputs, "flush", "send")
    watch.watch(runner._builder, "build", "prepare")
    watch.watch(runner.model, "forward", "layers")
    watch.watch(runner.model, "logits", "head")
    watch.watch(sampler, "sample", "sample")
    if runner.greedy is not None:
        watch_greedy(runner, watch)
    for streams in (int(s) for s in args.streams.split(",")):
        run(core, watch, streams, args.prompt, args.steps)


if __name__ == "__main__":
    main()
