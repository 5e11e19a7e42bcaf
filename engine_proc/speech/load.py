"""Loads a speech checkpoint into a runner: weights, caches sized from memory, vocabulary, a self-test.

Called once by the engine process before its loop starts. Whatever is wrong with a checkpoint becomes one StartError
sentence. Whisper runs on our own layers, any other sequence-to-sequence speech model on those of transformers.
"""
from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_proc import checkpoint
from engine_proc.attention import PagedAttention
from engine_proc.checkpoint import refuse
from engine_proc.device import Device, available_cores, choose
from engine_proc.kernels import Kernels
from engine_proc.layers import Ops, TorchOps
from engine_proc.loader import Progress, enough_memory
from engine_proc.plan import PlanItem, StepPlan
from engine_proc.speech import products
from engine_proc.speech.caches import CrossCache, SelfCache
from engine_proc.speech.request import SpeechRequest, Take, Window
from engine_proc.speech.runner import SpeechRunner
from engine_proc.speech.sampling import torch_argmax
from engine_proc.speech.vocabulary import Vocabulary
from engine_proc.speech.whisper import Whisper, WhisperShape
from engine_proc.weights import Weights
from pipeline.config import EngineConfig, ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MEMORY
from pipeline.messages import Route
from pipeline.params import DetokSpec, SamplingParams, SpeechParams

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CACHE_BYTES = 4 * 2**30
CACHE_SHARE = 0.25              # of the available memory


def load_speech(model: ModelConfig, progress: Progress) -> SpeechRunner:
    """A runner that has passed its self-test; StartError if there is none."""
    directory, engine = Path(model.path), model.engine
    config = checkpoint.check(directory)
    if engine.quantization not in (None, "int8"):
        raise StartError(CONFIG, f"There is no quantization '{engine.quantization}'; the one there is, is int8.")
    # Float32 unless told otherwise: transcripts are then those of the authors' models, word for word.
    name = "float32" if engine.dtype == "auto" else engine.dtype
    if name not in DTYPES:
        raise StartError(CONFIG, f"Speech models run in float32 or bfloat16 here, not in {name}.")
    device = choose(engine.device)
    progress("loading weights", 0)
    with enough_memory(directory):
        if config["model_type"] != "whisper":
            from engine_proc.speech.hf_net import load_hf_speech
            runner = load_hf_speech(model, config, DTYPES[name], device)
        else:
            runner = _whisper(model, config, DTYPES[name], device, progress)
    progress("self-test", 95)
    self_test(runner, directory)
    progress("ready", 100)
    return runner


def _whisper(model: ModelConfig, config: dict[str, Any], dtype: torch.dtype, device: Device,
             progress: Progress) -> SpeechRunner:
    directory, engine = Path(model.path), model.engine
    shape, vocabulary = WhisperShape.of(config), Vocabulary.read(directory, config)
    threads = engine.threads or available_cores()
    torch.set_num_threads(threads)
    ops, kernels = _ops(engine, shape, threads, progress)
    slots, num_blocks = cache_sizes(engine, vocabulary.max_length, 2 * shape.decoder_layers * shape.width * dtype.itemsize,
                                    shape.frames, device.available_bytes())
    pages = PagedAttention(shape.decoder_layers, num_blocks, engine.block_size, shape.decoder_heads, shape.head_dim,
                           dtype, device.torch_device)
    # Each step reads all of it for each window, which is most of what a step reads.
    heard = torch.bfloat16 if engine.quantization else dtype
    cross = CrossCache(shape.decoder_layers, slots, shape.frames, shape.decoder_heads, shape.head_dim, heard, kernels)
    weights = Weights(directory, dtype)
    net = Whisper(
        shape, weights, ops, products.int8 if engine.quantization else products.plain,
        SelfCache(pages, shape.decoder_heads, kernels), cross, torch_argmax if kernels is None else _argmax(kernels), threads,
        kernels if engine.quantization and shape.width // shape.encoder_heads in range(16, 129, 16) else None)
    weights.close()
    facts = {"dtype": str(dtype).removeprefix("torch."), "device": device.name, "backend": "own",
             "architecture": "whisper", "arithmetic": ops.name, "mels": shape.mels, "window_s": 30.0,
             "input": "log_mel", "windows": slots, **_abilities(vocabulary)}
    if engine.quantization:
        facts["quantization"] = engine.quantization
    return SpeechRunner(net, vocabulary, device, engine, num_blocks, slots, shape.frames / 30.0, facts)


def _abilities(vocabulary: Vocabulary) -> dict[str, Any]:
    """What the frontend must know to refuse by name what the model cannot do."""
    return {"languages": sorted(vocabulary.languages), "translates": vocabulary.multilingual and vocabulary.translate >= 0,
            "timestamps": vocabulary.timestamp_begin >= 0, "words": bool(vocabulary.alignment_heads),
            "prompts": vocabulary.sot_prev >= 0}


def _ops(engine: EngineConfig, shape: WhisperShape, threads: int, progress: Progress) -> tuple[Ops, Kernels | None]:
    reason = "they are switched off"
    if engine.kernels:
        from engine_proc import fused
        progress("compiling the kernels", 0)
        made = fused.load_kernels(threads) if shape.head_dim % 8 == 0 else None
        if made is not None:
            log.info("CPU kernels: %s", made.describe())
            return fused.KernelOps(made, "int8" if engine.quantization else None), made
        reason = "no C compiler was found, or the head size is odd"
    if engine.quantization is not None:
        raise StartError(CONFIG, f"--quantization {engine.quantization} needs the CPU kernels, and {reason}.")
    return TorchOps(), None


def _argmax(kernels: Kernels) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    def argmax(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        tokens, logprobs, nan = kernels.argmax(logits, logprobs=True)
        assert logprobs is not None
        return tokens.long(), logprobs.masked_fill_(nan, float("nan"))
    return argmax


def cache_sizes(engine: EngineConfig, max_length: int, per_position: int, frames: int, available: int) -> tuple[int, int]:
    """Slots for encoder states and KV blocks (block 0 included): as many windows at once as memory and settings allow.

    `per_position`: bytes of keys and values of one position over all layers.
    """
    blocks = -(-max_length // engine.block_size)
    per_window = per_position * (frames + blocks * engine.block_size)
    budget = engine.kv_cache_bytes or int(min(CACHE_BYTES, CACHE_SHARE * available))
    slots = min(engine.max_num_seqs, budget // per_window)
    if slots < 1:
        if engine.kv_cache_bytes is not None or per_window > 0.85 * available:
            raise StartError(MEMORY, f"One window of audio takes {per_window / 2**20:.0f} MiB of cache, and "
                                     f"{min(budget, available) / 2**20:.0f} MiB are there for it.")
        slots = 1
    return slots, engine.num_kv_blocks or slots * blocks + 1


def self_test(runner: SpeechRunner, directory: Path) -> None:
    """Half a second of faint noise, start to end: the logits must be finite, and a second step must follow."""
    noise = np.random.default_rng(0).standard_normal
    if runner.facts["input"] == "log_mel":
        features = noise((runner.facts["mels"], 3000), np.float32) * np.float32(0.1)
    else:
        features = noise(8000, np.float32) * np.float32(0.01)
    params = SpeechParams("transcribe", None, "", "", False, False, [0.0], SamplingParams(temperature=0.0))
    request = SpeechRequest(rid=0, route=Route(0, 0, 0, 0, 0, 0), params=params, deadline_ns=0, priority=0, alone=False,
                            arrival=0, arrived_ns=0, language=None, previous=[])
    window = Window(request, None, features)
    vocabulary = runner.vocabulary
    prompt = vocabulary.prompt([], min(vocabulary.languages, default=None), False, False)
    take = Take(rid=0, route=request.route, choice=0, tokens=array("I", prompt), num_prompt=len(prompt),
                sampling=params.sampling, detok=DetokSpec(), max_total=len(prompt) + 2, block_table=[1], window=window)
    runner.encode([window])
    runner.admit(take)
    try:
        for start, count in ((0, len(prompt)), (len(prompt), 1)):
            item = PlanItem(seq=take, start=start, count=count, sample=True)
            (result,) = runner.collect(runner.launch(StepPlan(number=0, items=[item])))
            if result.token is None:
                raise refuse(f"The model in {directory} computes no finite probabilities; its weights are damaged, or "
                             f"{runner.facts['dtype']} is too narrow for it.")
            take.tokens.append(result.token)
    finally:
        runner.release(take)
        runner.let_go(window)
