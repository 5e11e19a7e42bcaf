"""Tiny random checkpoints of the families that pool, and what a runner makes of some inputs."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

from engine_proc.pooling.loader import load_pool_runner
from engine_proc.pooling.plan import PoolBatch, PoolResult
from engine_proc.pooling.request import PoolItem, PoolRequest
from engine_proc.pooling.runner import ModelPoolRunner
from pipeline.config import EngineConfig, ModelConfig
from pipeline.messages import pack_ids
from pipeline.params import PoolParams

VOCAB, HIDDEN, LABELS = 90, 32, 3
COMMON: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 48, "max_position_embeddings": 80}
DECODER = {**COMMON, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, transformers.PreTrainedConfig] = {
    "bert": transformers.BertConfig(**COMMON),
    "roberta": transformers.RobertaConfig(**COMMON),
    "xlm-roberta": transformers.XLMRobertaConfig(**COMMON, type_vocab_size=1),
    "distilbert": transformers.DistilBertConfig(
        vocab_size=VOCAB, dim=HIDDEN, n_layers=3, n_heads=4, hidden_dim=48, max_position_embeddings=80),
    "mpnet": transformers.MPNetConfig(**COMMON),
    "electra": transformers.ElectraConfig(**COMMON, embedding_size=24),
    "modernbert": transformers.ModernBertConfig(
        **COMMON, local_attention=10, pad_token_id=0, eos_token_id=1, bos_token_id=1, cls_token_id=1, sep_token_id=1),
    "nomic_bert": transformers.NomicBertConfig(**COMMON),
    "deberta-v2": transformers.DebertaV2Config(
        **COMMON, relative_attention=True, pos_att_type=["p2c", "c2p"], type_vocab_size=0, position_biased_input=False),
    "qwen3": transformers.Qwen3Config(**DECODER, tie_word_embeddings=True),
    "llama": transformers.LlamaConfig(**DECODER),
    "gemma3_text": transformers.Gemma3TextConfig(
        **DECODER, sliding_window=8, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        query_pre_attn_scalar=8, use_bidirectional_attention=True),
}


def make(family: str, directory: Path, end: str = "", **changes: Any) -> Any:
    """Save a random model of a family and return it: AutoModel, or AutoModelFor`end`."""
    torch.manual_seed(len(family))
    config = type(CONFIGS[family])(**{**CONFIGS[family].to_dict(), **changes})
    net = getattr(transformers, f"AutoModelFor{end}" if end else "AutoModel").from_config(config).float().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.05))
    net.save_pretrained(directory)
    return net


def add_modules(directory: Path, *, pooling: dict[str, Any], normalize: bool = True, dense: int = 0) -> torch.Tensor | None:
    """sentence-transformers' module files; the weight of the dense module, if there is one."""
    kinds = ["Transformer", "Pooling", *(["Dense"] if dense else []), *(["Normalize"] if normalize else [])]
    (directory / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)]))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": HIDDEN, **pooling}))
    if not dense:
        return None
    weight = torch.randn(dense, HIDDEN) * 0.2
    (directory / "2_Dense").mkdir()
    (directory / "2_Dense" / "config.json").write_text(json.dumps({
        "in_features": HIDDEN, "out_features": dense, "bias": False,
        "activation_function": "torch.nn.modules.activation.Tanh"}))
    save_file({"linear.weight": weight}, directory / "2_Dense" / "model.safetensors")
    return weight


def load(directory: Path, task: str = "embed", *, pooler: dict[str, Any] | None = None, max_model_len: int = 78,
         **engine: Any) -> ModelPoolRunner:
    engine = {"threads": 2, "max_step_tokens": 256} | engine
    return load_pool_runner(ModelConfig(
        names=("m",), path=str(directory), task=task, max_model_len=max_model_len, vocab_size=VOCAB,
        pooler=pooler or {}, engine=EngineConfig(**engine)), lambda phase, percent: None)


def texts(*lengths: int, low: int = 4) -> list[list[int]]:
    generator = np.random.default_rng(sum(lengths))
    return [generator.integers(low, VOCAB, length).tolist() for length in lengths]


def compute(runner: ModelPoolRunner, inputs: list[list[int]], task: str | None = None, *,
            activation: bool | None = None, dimensions: int = 0, types: list[list[int]] | None = None,
            skips: list[int] | None = None) -> list[np.ndarray]:
    """The rows of each input, all of them in one batch."""
    params = PoolParams(task or runner.tasks[0], activation, dimensions)
    request = PoolRequest(rid=1, params=params, total=0, deadline_ns=0, priority=0, alone=False, arrival=0,
                          arrived_ns=0, served_ns=0)
    items = [PoolItem(request, i, pack_ids(ids), bytes(types[i]) if types else b"",
                      skip=min(skips[i], len(ids) - 1) if skips else 0) for i, ids in enumerate(inputs)]
    return [rows_of(result) for result in runner.collect(runner.launch(PoolBatch(number=1, items=items)))]


def rows_of(result: PoolResult) -> np.ndarray:
    assert result.rows is not None and result.error is None
    return result.rows


def hidden(net: Any, ids: list[int], types: list[int] | None = None) -> torch.Tensor:
    """The reference: the last hidden states [T, hidden] of one input by itself."""
    given = {"input_ids": torch.tensor([ids])}
    if types is not None:
        given["token_type_ids"] = torch.tensor([types])
    with torch.no_grad():
        return net(**given).last_hidden_state[0].float()


def cosine(a: np.ndarray, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(torch.from_numpy(a).flatten(), b.flatten(), dim=0))
