"""Loads a prepared checkpoint into a runner: architecture, weights, KV cache size, threads, a self-test.

`load_runner` is called once by the engine process before its loop starts. Whatever is wrong with a checkpoint becomes
one StartError sentence; nothing here is reachable by a request. Loads transformers only where its backend is used.
"""
from __future__ import annotations

import gc
import logging
import math
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine_proc import arch as architectures
from engine_proc import checkpoint
from engine_proc.attention import PagedAttention
from engine_proc.checkpoint import refuse
from engine_proc.decoder import Decoder, load_decoder
from engine_proc.device import Device, available_cores, choose
from engine_proc.layers import Ops, TorchOps
from engine_proc.parallel.share import WHOLE
from engine_proc.plan import PlanItem, StepPlan
from engine_proc.request import Sequence
from engine_proc.rope import Unfit
from engine_proc.runner import Model, ModelRunner
from engine_proc.weights import Weights
from pipeline.config import EngineConfig, ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MEMORY
from pipeline.messages import Route
from pipeline.params import DetokSpec, SamplingParams

if TYPE_CHECKING:
    from engine_proc.parallel.team import Team

Progress = Callable[[str, int], None]
log = logging.getLogger(__name__)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DEFAULT_KV_BYTES = 4 * 2**30
KV_SHARE = 0.25                 # of the available memory, by default
KV_MOST = 0.85                  # of the available memory, for one sequence of full length

# Models whose layers keep something other than keys and values per position, or whose attention is not causal.
STATE = "keeps a recurrent state beside or in place of keys and values"
REFUSED = {
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "jamba", "bamba", "zamba", "zamba2",
                     "granitemoehybrid", "falcon_h1", "nemotron_h", "lfm2", "lfm2_moe", "qwen3_next", "kimi_linear",
                     "minimax", "xlstm", "flex_olmo_hybrid", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "plamo2"), STATE),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "longcat_flash",
                     "minicpm3", "glm4_moe_lite"), "uses multi-head latent attention"),
    **dict.fromkeys(("bert", "roberta", "distilbert", "modernbert", "xlm-roberta", "deberta-v2", "electra"),
                    "is an encoder"),
}


def load_runner(model: ModelConfig, progress: Progress, run_dir: Path | None = None) -> ModelRunner:
    """A runner that has passed its self-test. `progress(phase, percent)` is called now and then; StartError if not.

    `run_dir`: where the ranks of a model that is split meet.
    """
    engine = model.engine
    directory = Path(model.path)
    config = checkpoint.check(directory)
    refuse_unsupported(config)
    if engine.quantization not in (None, "int8"):
        raise StartError(CONFIG, f"There is no quantization '{engine.quantization}'; the one there is, is int8.")
    if engine.tensor_parallel > 1:
        from engine_proc.parallel.start import load_split_runner
        return load_split_runner(model, config, progress, run_dir)
    torch.set_num_threads(engine.threads or available_cores())
    device = choose(engine.device)
    progress("loading weights", 0)
    with enough_memory(directory):
        net, shape, facts = load_model(model, config, device, progress)
        progress("allocating the KV cache", 90)
        gc.collect()
        num_blocks = count_blocks(engine, model.max_model_len, block_bytes(shape, engine.block_size, facts["dtype"]),
                                  device.available_bytes())
        cache = PagedAttention(num_blocks=num_blocks, block_size=engine.block_size, dtype=DTYPES[facts["dtype"]],
                               device=device.torch_device, **shape)
        if isinstance(net, Decoder) and net.ops.name == "kernels":
            from engine_proc.fused import FusedDecoder
            net = FusedDecoder(net, cache)
    runner = ModelRunner(net, cache, device, engine, num_blocks, model.max_model_len, facts)
    progress("self-test", 95)
    self_test(runner, directory)
    progress("ready", 100)
    return runner


@contextmanager
def enough_memory(directory: Path) -> Iterator[None]:
    """Whatever says that memory ran out becomes one sentence."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise StartError(MEMORY, f"There is not enough memory to load {directory}.") from None
    except RuntimeError as error:
        if "alloc" in str(error).lower():       # what torch raises when the host has no memory
            raise StartError(MEMORY, f"There is not enough memory to load {directory}.") from None
        raise


def refuse_unsupported(config: dict[str, Any]) -> None:
    """StartError that names what this engine cannot run."""
    name = config["model_type"]
    if name in REFUSED:
        raise refuse(f"Models of type '{name}' are not supported: the architecture {REFUSED[name]}.")
    if config.get("is_encoder_decoder"):
        raise refuse(f"Models of type '{name}' are not supported: the architecture is an encoder-decoder.")
    quantised = config.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method", "an unknown method") if isinstance(quantised, dict) else "quantised"
        raise refuse(f"The checkpoint is quantised with {method}, which this engine does not load; "
                     "use the original weights or a GGUF file.")


def load_model(model: ModelConfig, config: dict[str, Any], device: Device,
               progress: Progress) -> tuple[Model, dict[str, int], dict[str, Any]]:
    """The model, the shape of its cache (layers, kv_heads, head_dim) and facts about it."""
    directory, backend = Path(model.path), model.engine.backend
    if backend not in ("auto", "own", "transformers"):
        raise StartError(CONFIG, f"There is no model backend '{backend}'.")
    why = ""
    if backend != "transformers":
        try:
            return own_model(model, config, device, progress)
        except Unfit as unfit:
            why = str(unfit)
            if backend == "own":
                raise refuse(f"The own backend cannot run {directory}: {why}.") from None
    if model.engine.quantization is not None:
        raise StartError(CONFIG, f"--quantization {model.engine.quantization} works with the own backend only.")
    from engine_proc.hf_model import load_hf_model
    torch.set_num_threads(model.engine.threads or available_cores())
    dtype = _dtype(model.engine, Weights(directory), device)
    hf, shape = load_hf_model(directory, dtype, model, device, lambda percent: progress("loading weights", percent))
    return hf, shape, _facts(config, dtype, device, "transformers", why)


def own_model(model: ModelConfig, config: dict[str, Any], device: Device, progress: Progress,
              team: Team | None = None) -> tuple[Decoder, dict[str, int], dict[str, Any]]:
    """`load_model` for the own decoder, or for the part of it that this member of `team` holds. Unfit if it is not one."""
    arch = architectures.describe(config)
    for rope in arch.ropes:
        if rope.kind == "dynamic" and model.max_model_len > rope.original_max:
            raise refuse(f"Dynamic rope scaling works up to {rope.original_max} positions here; "
                         f"--max-model-len {model.max_model_len} is more.")
    weights = Weights(Path(model.path))
    dtype = weights.dtype = _dtype(model.engine, weights, device)
    if team is None:
        ops, share = choose_ops(model.engine, arch, dtype, device, progress), WHOLE
    else:
        from engine_proc.parallel.ops import ParallelOps
        ops, share = ParallelOps(team, arch.vocab), team.share
    net = load_decoder(arch, weights, ops, model.max_model_len,
                       lambda percent: progress("loading weights", percent * 9 // 10), share=share)
    left = weights.left_over()
    if left:
        raise Unfit(f"the description of '{arch.family}' does not use the tensor '{left[0]}'")
    weights.close()
    shape = {"layers": len(arch.layers), "kv_heads": arch.kv_heads, "head_dim": arch.head_dim}
    facts = _facts(config, dtype, device, "own", "") | {"arithmetic": ops.name}
    return net, shape, facts | ({"quantization": model.engine.quantization} if model.engine.quantization else {})


def choose_ops(engine: EngineConfig, arch: architectures.Arch, dtype: torch.dtype, device: Device,
               progress: Progress) -> Ops:
    """The kernels where they are wanted and can run the model, else torch."""
    reason = "they are switched off"
    if device.name == "cpu" and engine.kernels:
        from engine_proc import fused
        progress("compiling the kernels", 0)
        unfit = fused.why_not(arch, dtype)
        made = fused.load_kernels(engine.threads or available_cores()) if unfit is None else None
        if made is not None:
            torch.set_num_threads(1)        # the kernels have threads of their own; two pools would fight for the cores
            log.info("CPU kernels: %s", made.describe())
            return fused.KernelOps(made, "int8" if engine.quantization else None)
        reason = f"they do not know {unfit}" if unfit is not None else "no C compiler was found"
    if engine.quantization is not None:
        raise StartError(CONFIG, f"--quantization {engine.quantization} needs the CPU kernels, and {reason}.")
    return TorchOps()


def _dtype(engine: EngineConfig, weights: Weights, device: Device) -> torch.dtype:
    if engine.dtype == "auto":
        return device.default_dtype(weights.native())
    if engine.dtype not in DTYPES:
        raise StartError(CONFIG, f"There is no dtype '{engine.dtype}'; use auto, bfloat16, float16 or float32.")
    return DTYPES[engine.dtype]


def _facts(config: dict[str, Any], dtype: torch.dtype, device: Device, backend: str, why: str) -> dict[str, Any]:
    facts = {"dtype": str(dtype).removeprefix("torch."), "device": device.name, "backend": backend,
             "architecture": config["model_type"]}
    return facts | ({"own_backend": why} if why else {})


def block_bytes(shape: dict[str, int], block_size: int, dtype: str) -> int:
    """Bytes of one KV block over all layers."""
    return 2 * shape["layers"] * block_size * shape["kv_heads"] * shape["head_dim"] * DTYPES[dtype].itemsize


def count_blocks(engine: EngineConfig, max_model_len: int, per_block: int, available: int) -> int:
    """KV blocks, the reserved block 0 included; StartError(MEMORY) when not even one full-length sequence fits."""
    needed = math.ceil(max_model_len / engine.block_size) + 1
    if engine.num_kv_blocks is not None:
        if engine.num_kv_blocks < 2:
            raise StartError(CONFIG, "The KV cache needs two blocks at least.")
        return engine.num_kv_blocks
    gib = f"{needed * per_block / 2**30:.2f} GiB"
    if engine.kv_cache_bytes is not None:
        if engine.kv_cache_bytes // per_block < needed:
            raise StartError(MEMORY, f"A KV cache of {engine.kv_cache_bytes / 2**30:.2f} GiB does not hold one "
                                     f"sequence of {max_model_len} tokens, which takes {gib}; lower --max-model-len.")
        if engine.kv_cache_bytes > available:
            raise StartError(MEMORY, f"There is no memory for a KV cache of {engine.kv_cache_bytes / 2**30:.2f} GiB: "
                                     f"{available / 2**30:.2f} GiB are available.")
        return engine.kv_cache_bytes // per_block
    if needed * per_block > KV_MOST * available:
        raise StartError(MEMORY, f"One sequence of {max_model_len} tokens takes {gib} of KV cache and "
                                 f"{available / 2**30:.2f} GiB are available; lower --max-model-len.")
    return max(needed, int(min(DEFAULT_KV_BYTES, KV_SHARE * available)) // per_block)


def self_test(runner: ModelRunner, directory: Path) -> None:
    """One tiny request, start to end: the logits must be finite and a second step must follow from the cache."""
    tokens = array("I", [i % runner.vocab_size for i in (1, 2, 3)])
    seq = Sequence(rid=0, route=Route(0, 0, 0, 0, 0, 0), choice=0, tokens=tokens, num_prompt=3,
                   sampling=SamplingParams(temperature=0.0), detok=DetokSpec(), max_total=5, block_table=[1])
    runner.admit(seq)
    try:
        for start, count in ((0, 3), (3, 1)):
            item = PlanItem(seq=seq, start=start, count=count, sample=True)
            (result,) = runner.collect(runner.launch(StepPlan(number=0, items=[item])))
            if result.token is None:
                raise refuse(f"The model in {directory} computes no finite probabilities; its weights are damaged, or "
                             f"{runner.facts['dtype']} is too narrow for it.")
            seq.tokens.append(result.token)
    finally:
        runner.release(seq)
    assert np.isfinite(float(runner.cache.k[0][1].float().sum()))
