"""Loads a model that is split over ranks: rank 0's runner, and what each other rank holds.

Rank 0 starts the others, all load their shares side by side, and rank 0 sizes the cache for all; the self-test runs
through every rank, so that an engine which is ready has them all. Called once, by the loader and by the ranks.
"""
from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from engine_proc import arch as architectures
from engine_proc import checkpoint
from engine_proc.checkpoint import refuse
from engine_proc.decoder import Decoder
from engine_proc.device import Device, available_cores, choose
from engine_proc.loader import DTYPES, Progress, block_bytes, count_blocks, enough_memory, own_model, self_test
from engine_proc.parallel import frames
from engine_proc.parallel.ranks import LeaderCache, LeaderModel, Ranks
from engine_proc.parallel.share import Share, why_not
from engine_proc.parallel.team import join
from engine_proc.rope import Unfit
from engine_proc.runner import ModelRunner
from pipeline.config import EngineConfig, ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG


def load_split_runner(model: ModelConfig, config: dict[str, Any], progress: Progress,
                      run_dir: Path | None) -> ModelRunner:
    """Rank 0's runner, which has passed its self-test together with all ranks; StartError if not."""
    engine, directory = model.engine, Path(model.path)
    check(engine, config, directory)
    device = choose(engine.device)
    progress(f"starting {engine.tensor_parallel} ranks", 0)
    ranks = Ranks(model, run_dir)
    try:
        with enough_memory(directory):
            set_threads(engine)
            team = ranks.join(device)
            net, shape, facts = own_model(model, config, device, progress, team)
            progress("waiting for the other ranks", 90)
            others = ranks.loaded()
            gc.collect()
            available = device.available_bytes()
            if device.name != "cpu":                # ranks on a CPU share its memory, others have a device each
                available = min(available, *others) * ranks.size
            per_block = block_bytes(shape, engine.block_size, facts["dtype"])
            num_blocks = count_blocks(engine, model.max_model_len, per_block, available)
            ranks.tell(frames.CACHE, num_blocks)
            cache = LeaderCache(ranks, **cache_shape(
                shape, team.share, num_blocks, engine.block_size, DTYPES[facts["dtype"]], device))
        facts = facts | {"tensor_parallel": ranks.size}
        runner = ModelRunner(LeaderModel(net, ranks), cache, device, engine, num_blocks, model.max_model_len, facts)
        runner.depth = 0                            # the ranks take the ids of a step from the host
        progress("self-test", 95)
        self_test(runner, directory)
    except BaseException:
        ranks.close()
        raise
    progress("ready", 100)
    return runner


def check(engine: EngineConfig, config: dict[str, Any], directory: Path) -> None:
    """StartError with what keeps a model from being split, before anything is started."""
    flag = f"--tensor-parallel-size {engine.tensor_parallel}"
    if engine.quantization is not None:
        raise StartError(CONFIG, f"{flag} and --quantization {engine.quantization} exclude each other: the quantised "
                                 "kernels work on whole models.")
    if engine.backend == "transformers":
        raise StartError(CONFIG, f"{flag} needs the own backend: models that run through transformers are not split.")
    try:
        arch = architectures.describe(config)
    except Unfit as unfit:
        raise refuse(f"{flag} needs the own backend, which cannot run {directory}: {unfit}.") from None
    reason = why_not(arch, engine.tensor_parallel)
    if reason is not None:
        raise StartError(CONFIG, f"{flag} does not fit the model {directory}: {reason}.")


def set_threads(engine: EngineConfig) -> None:
    """The ranks of one machine share its cores; --threads counts those of all."""
    torch.set_num_threads(max(1, (engine.threads or available_cores()) // engine.tensor_parallel))


def cache_shape(shape: dict[str, int], share: Share, num_blocks: int, block_size: int, dtype: torch.dtype,
                device: Device) -> dict[str, Any]:
    """The arguments of a rank's cache; `shape` is that of the whole model's."""
    return {**shape, "kv_heads": shape["kv_heads"] // share.size, "num_blocks": num_blocks, "block_size": block_size,
            "dtype": dtype, "device": device.torch_device}


def load_rank(model: ModelConfig, share: Share, store: Path) -> tuple[Decoder, dict[str, int], torch.dtype, Device]:
    """A rank's part of the decoder, the shape of the whole model's cache, its dtype, and the rank's device."""
    set_threads(model.engine)
    device = choose(model.engine.device, share.rank)
    with enough_memory(Path(model.path)):
        team = join(share, store, device.torch_device)
        net, shape, facts = own_model(model, checkpoint.check(Path(model.path)), device, lambda phase, percent: None, team)
    return net, shape, DTYPES[facts["dtype"]], device
