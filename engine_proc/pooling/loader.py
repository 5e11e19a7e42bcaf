"""Loads a prepared checkpoint into a pooling runner: body, head, threads, a self-test.

`load_pool_runner` is called once by the engine process before its loop starts. Whatever is wrong with a checkpoint
becomes one StartError sentence. Loads transformers only where our own layers do not fit.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_proc import arch as decoders
from engine_proc import checkpoint, kernels
from engine_proc.checkpoint import refuse
from engine_proc.device import available_cores, choose
from engine_proc.kernels import WeightType
from engine_proc.loader import DTYPES, Progress, choose_ops, enough_memory
from engine_proc.pooling import classifiers, encoder_arch
from engine_proc.pooling.body import Body, Packed
from engine_proc.pooling.decoder_body import HEAD_NAMES, DecoderBody, token_rows
from engine_proc.pooling.encoder import Encoder
from engine_proc.pooling.heads import DenseLayer, EmbedHead, Head, LogitsHead
from engine_proc.pooling.runner import ModelPoolRunner
from engine_proc.rope import Unfit
from engine_proc.weights import Weights
from pipeline.config import ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.pooling_files import Dense, PoolingFiles, describe, token_id

SPIN_US = 50.0                 # how long a thread of the kernels spins for work: about the pause between two of them
COLBERT = "linear.weight"      # of ColBERT checkpoints without sentence-transformers' modules
log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Source:
    """A checkpoint on its way to becoming a runner."""

    model: ModelConfig
    directory: Path            # of the transformer
    files: PoolingFiles
    config: dict[str, Any]
    weights: Weights
    dtype: torch.dtype
    threads: int
    progress: Progress

    @property
    def kind(self) -> str:
        """The end of the architecture's class name."""
        names = self.config.get("architectures") or [""]
        return next((end for end in ("SequenceClassification", "TokenClassification", "CausalLM")
                     if str(names[0]).endswith("For" + end)), "")


def load_pool_runner(model: ModelConfig, progress: Progress) -> ModelPoolRunner:
    """A runner that has passed its self-test; StartError if not."""
    root = Path(model.path)
    files = describe(root, model.pooler)
    directory = root / files.weights
    config = checkpoint.check(directory)
    text = config.get("text_config")
    weights = Weights(directory)
    threads = model.engine.threads or available_cores()
    torch.set_num_threads(threads)
    source = _Source(model, directory, files, {**config, **text} if isinstance(text, dict) else config, weights,
                     _dtype(model, weights.native()), threads, progress)
    weights.dtype = source.dtype
    progress("loading weights", 0)
    with enough_memory(directory):
        body, head, facts = _build(source)
    weights.close()
    matryoshka = files.matryoshka
    runner = ModelPoolRunner(body, head, matryoshka, facts | {
        "dtype": str(source.dtype).removeprefix("torch."), "device": "cpu", "architecture": config["model_type"],
        "labels": _labels(source, head), "late_interaction": files.late_interaction or COLBERT in weights,
        "similarity": files.similarity})
    progress("self-test", 95)
    _self_test(body, directory)
    progress("ready", 100)
    return runner


def _dtype(model: ModelConfig, native: torch.dtype) -> torch.dtype:
    """`auto`: that of the files; float16 is widened, as the kernels do not multiply it."""
    choose(model.engine.device)
    if model.engine.dtype == "auto":
        return torch.bfloat16 if native == torch.bfloat16 else torch.float32
    if model.engine.dtype not in DTYPES:
        raise StartError(CONFIG, f"There is no dtype '{model.engine.dtype}'; use auto, bfloat16, float16 or float32.")
    return DTYPES[model.engine.dtype]


def _build(source: _Source) -> tuple[Body, Head, dict[str, Any]]:
    backend, why = source.model.engine.backend, ""
    if backend not in ("auto", "own", "transformers"):
        raise StartError(CONFIG, f"There is no model backend '{backend}'.")
    if backend != "transformers":
        for build in (_encoder, _decoder):
            try:
                return build(source)
            except Unfit as unfit:
                why = why or str(unfit)
        if backend == "own":
            raise refuse(f"The own backend cannot run {source.directory}: {why}.")
    if source.model.engine.quantization is not None:
        raise StartError(CONFIG, f"--quantization {source.model.engine.quantization} works with the own backend only.")
    return _transformers(source, why)


def _encoder(source: _Source) -> tuple[Body, Head, dict[str, Any]]:
    model, weights = source.model, source.weights
    arch = encoder_arch.describe(source.config)
    if source.dtype == torch.float16:
        raise Unfit("float16")
    longest = min(model.max_model_len, arch.max_positions)
    made, quantization = _kernels(source)
    body = Encoder(arch, made, weights, longest, quantization,
                   lambda percent: source.progress("loading weights", percent * 9 // 10))
    head: Head | None
    if model.task == "embed":
        head = _embed_head(source, body.width, "mean")
    elif source.kind in ("SequenceClassification", "TokenClassification"):
        activation = classifiers.default_activation(source.config, source.files,
                                                    classifiers.num_labels(source.config))
        head = classifiers.encoder_head(weights, source.config, body.width, activation,
                                        source.kind == "TokenClassification")
        if head is None:
            raise Unfit(f"the classifier of '{arch.family}'")
    else:
        raise refuse(f"The model {source.directory} has no classifier, so it cannot serve '{model.task}'.")
    left = [name for name in weights.left_over() if "layer." in name or "layers." in name]
    if left:
        raise Unfit(f"the description of '{arch.family}' does not use the tensor '{left[0]}'")
    return body, head, {"backend": "own", "arithmetic": "kernels" if made.native else "torch"}


def _kernels(source: _Source) -> tuple[kernels.Kernels, WeightType | None]:
    engine = source.model.engine
    source.progress("compiling the kernels", 0)
    made = kernels.load(level=None if engine.kernels else "torch")
    if made.native:
        made.set_num_threads(source.threads)
        made.set_spin(SPIN_US)
        torch.set_num_threads(1)        # two teams of threads would fight for the cores
    log.info("CPU kernels: %s", made.describe())
    if engine.quantization not in (None, "int8"):
        raise StartError(CONFIG, f"There is no quantization '{engine.quantization}'; the one there is, is int8.")
    return made, "int8" if engine.quantization else None


def _decoder(source: _Source) -> tuple[Body, Head, dict[str, Any]]:
    model, weights, config = source.model, source.weights, dict(source.config)
    if config.get("use_bidirectional_attention") or config.get("is_causal") is False:
        raise Unfit("attention to both sides")
    if not any("lm_head" in name for name in weights.table):
        config["tie_word_embeddings"] = True                 # an embedding model carries no head
    arch = decoders.describe(config)
    device = choose(model.engine.device)
    ops = choose_ops(model.engine, arch, source.dtype, device, source.progress)
    if ops.name == "kernels":
        ops.kernels.set_spin(SPIN_US)  # type: ignore[attr-defined]
    body = DecoderBody(arch, weights, ops, device, model.max_model_len, model.engine.max_step_tokens,
                       model.engine.max_num_seqs, model.engine.block_size,
                       lambda percent: source.progress("loading weights", percent * 9 // 10))
    head: Head
    tokens = _tokens(source)
    if model.task == "embed":
        head = _embed_head(source, body.width, "last")
    elif tokens:
        rows = token_rows(weights, arch, tokens)
        head = classifiers.token_head(rows, source.files.score_activation or ("sigmoid" if len(rows) == 2 else "softmax"))
    else:
        count = classifiers.num_labels(config)
        mode = source.files.pooling[0] if source.files.pooling else "last"
        head = classifiers.decoder_head(
            weights, body.width, count, mode, classifiers.default_activation(config, source.files, count),
            source.kind == "TokenClassification")
    for name in HEAD_NAMES:
        weights.ignore(name)
    left = weights.left_over()
    left = [name for name in left if "lm_head" not in name]
    if left:
        raise Unfit(f"the description of '{arch.family}' does not use the tensor '{left[0]}'")
    return body, head, {"backend": "own", "arithmetic": ops.name}


def _tokens(source: _Source) -> list[int]:
    """Ids of the tokens by whose logits a causal model scores: told, or "no" and "yes" of one without a classifier."""
    named = source.files.classifier_tokens or (("no", "yes") if source.kind == "CausalLM" else ())
    if source.model.task == "embed" or not named:
        return []
    tokenizer = Path(source.model.tokenizer or source.model.path)
    ids = [token_id(tokenizer, name) for name in named]
    missing = [name for name, number in zip(named, ids) if number is None]
    if missing:
        raise refuse(f"The tokenizer {tokenizer} has no token '{missing[0]}' to score by.")
    return [number for number in ids if number is not None]


def _transformers(source: _Source, why: str) -> tuple[Body, Head, dict[str, Any]]:
    from engine_proc.pooling.hf_body import HfBody
    model = source.model
    kind = "hidden" if model.task == "embed" else {
        "SequenceClassification": "sequence", "TokenClassification": "token"}.get(source.kind, "")
    if not kind:
        raise refuse(f"The model {source.directory} has no classifier, so it cannot serve '{model.task}'.")
    torch.set_num_threads(source.threads)
    body = HfBody(source.directory, source.dtype, kind, model.trust_remote_code)
    head: Head
    if kind == "hidden":
        causal = source.kind == "CausalLM" and not source.config.get("use_bidirectional_attention")
        head = _embed_head(source, body.width, "last" if causal else "mean")
    else:
        head = LogitsHead(body.width, classifiers.default_activation(source.config, source.files, body.width),
                          kind == "token")
    return body, head, {"backend": "transformers"} | ({"own_backend": why} if why else {})


def _embed_head(source: _Source, width: int, mode: str) -> EmbedHead:
    files, weights = source.files, source.weights
    modes, token_dense = files.pooling or (mode,), [_dense(source, layer) for layer in files.token_dense]
    if COLBERT in weights and not files.found:
        shape = weights.table[COLBERT].shape
        token_dense.append(DenseLayer(weights.get(COLBERT, (shape[0], width), torch.float32), None))
        modes = ("all",)
    late = modes == ("all",)
    return EmbedHead(width, modes, token_dense, [_dense(source, layer) for layer in files.dense],
                     True if files.normalize is None or late else files.normalize)


def _dense(source: _Source, layer: Dense) -> DenseLayer:
    """A dense module's own little checkpoint."""
    weights = Weights(Path(source.model.path) / layer.path, torch.float32)
    bias = weights.get("linear.bias", (layer.outputs,)) if layer.bias else None
    return DenseLayer(weights.get("linear.weight", (layer.outputs, layer.inputs)), bias, layer.activation)


def _labels(source: _Source, head: Head) -> list[str]:
    if not head.num_labels:
        return []
    tokens = source.files.classifier_tokens
    if len(tokens) > 2:
        return list(tokens)
    return classifiers.labels(source.config, head.num_labels)


def _self_test(body: Body, directory: Path) -> None:
    """One tiny batch: its numbers must be finite."""
    ids = np.array([1, 2, 3, 1, 2]) % body.vocab_size
    hidden = body.forward(Packed(ids=ids, type_ids=np.zeros(5, np.int64), starts=np.array([0, 3, 5], np.int32)))
    if not torch.isfinite(hidden).all():
        raise refuse(f"The model in {directory} computes no finite numbers; its weights are damaged, or the dtype is too "
                     "narrow for it.")
