"""`python -m engine_proc --config FILE --index N --epoch E`: one engine process serving one model.

Loads the runner while its beacon tells the launcher how far it is, then hands the engine's loop to the stage.
"""
from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from engine_proc.core import EngineCore
from engine_proc.plan import Runner
from engine_proc.pooling.core import PoolingCore
from engine_proc.pooling.plan import PoolRunner
from engine_proc.speech.core import SpeechCore
from pipeline.config import POOLING_TASKS, ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.messages import Kind
from pipeline.stage import Context, run


def load(model: ModelConfig, context: Context) -> Runner:
    """The runner that the configuration asks for. Only here does torch come into the process."""
    if model.engine.backend == "null":
        from engine_proc.null import NullRunner
        return NullRunner(model.engine, model.vocab_size)
    from engine_proc.loader import load_runner
    return load_runner(model, context.progress, Path(context.config.run_dir))


def load_pooling(model: ModelConfig, context: Context) -> PoolRunner:
    """The same for a model that gives vectors or class scores."""
    if model.engine.backend == "null":
        from engine_proc.pooling.null import NullPoolRunner
        return NullPoolRunner(model)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")     # torch's threads leave the cores to chat engines
    from engine_proc.pooling.loader import load_pool_runner
    return load_pool_runner(model, context.progress)


def build_pooling(context: Context, model: ModelConfig) -> PoolingCore:
    runner = load_pooling(model, context)
    core = PoolingCore(context.config, context.index, context.epoch, runner, context.sender, time.monotonic_ns,
                       context.registry)
    context.status.facts_json = json.dumps({
        "labels": [], "late_interaction": False, **runner.facts, "max_model_len": core.limits.max_model_len,
        "vocab_size": runner.vocab_size, "dimension": runner.dimension, "num_labels": runner.num_labels,
        "matryoshka": None if runner.matryoshka is None else list(runner.matryoshka),
        "tasks": list(runner.tasks)}).encode()
    return core


def build_speech(context: Context, model: ModelConfig) -> SpeechCore:
    from engine_proc.speech.load import load_speech
    runner = load_speech(model, context.progress)
    core = SpeechCore(context.config, context.index, context.epoch, runner, context.sender, time.monotonic_ns,
                      context.registry)
    context.status.facts_json = json.dumps({
        **runner.facts, "max_model_len": model.max_model_len, "vocab_size": runner.vocab_size,
        "tasks": ["transcribe"]}).encode()
    return core


def build(context: Context) -> EngineCore | PoolingCore | SpeechCore:
    engines = context.config.engines()
    if not 0 <= context.index < len(engines):
        raise StartError(CONFIG, f"The configuration has no engine number {context.index}.")
    model = context.config.models[engines[context.index]]
    context.progress("loading", 0)
    if model.task in POOLING_TASKS:
        return build_pooling(context, model)
    if model.task == "transcribe":
        return build_speech(context, model)
    runner = load(model, context)
    core = EngineCore(context.config, context.index, context.epoch, runner, context.sender, time.monotonic_ns,
                      context.registry)
    if model.engine.backend != "null":
        context.progress("reading the vocabulary", 98)
        core.grammars.prepare()
    context.status.facts_json = json.dumps({
        **runner.facts, "max_model_len": model.max_model_len, "vocab_size": runner.vocab_size,
        "num_blocks": runner.num_blocks, "kv_blocks": runner.num_blocks - 1, "block_size": runner.block_size,
        "kv_tokens": (runner.num_blocks - 1) * runner.block_size}).encode()
    return core


if __name__ == "__main__":
    sys.exit(run(Kind.ENGINE, build))
