"""Where each family keeps its classifier, and how it squashes class scores.

Used by the pooling loader. Tensors are named as transformers' classes save them; a class without a row here is run as
a whole by transformers.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from engine_proc.checkpoint import refuse
from engine_proc.pooling.heads import ClassifyHead, DenseLayer
from engine_proc.weights import Weights
from pipeline.pooling_files import PoolingFiles


@dataclass(frozen=True, slots=True)
class Place:
    """A layer ahead of the last one (`dense`, with its activation) and the last one."""

    dense: str | None
    activation: str
    last: str
    mode: str = "cls"


PLACES = {
    "bert": Place("{base}pooler.dense", "tanh", "classifier"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"),
                    Place("classifier.dense", "tanh", "classifier.out_proj")),
    "electra": Place("classifier.dense", "gelu", "classifier.out_proj"),
    "distilbert": Place("pre_classifier", "relu", "classifier"),
    "modernbert": Place("head.dense", "gelu", "classifier"),
}


def default_activation(config: dict[str, Any], files: PoolingFiles, num_labels: int) -> str:
    """What the model's files say: sentence-transformers' own key, the problem's type, or the number of labels."""
    if files.score_activation:
        return files.score_activation
    match config.get("problem_type"):
        case "regression":
            return "none"
        case "multi_label_classification":
            return "sigmoid"
    return "sigmoid" if num_labels == 1 else "softmax"


def num_labels(config: dict[str, Any]) -> int:
    """As transformers counts them: the labels' names, else two."""
    names = config.get("id2label")
    return len(names) if isinstance(names, dict) and names else int(config.get("num_labels") or 2)


def labels(config: dict[str, Any], count: int) -> list[str]:
    names = config.get("id2label")
    names = names if isinstance(names, dict) else {}
    return [str(names.get(str(i), f"LABEL_{i}")) for i in range(count)]


def encoder_head(weights: Weights, config: dict[str, Any], width: int, activation: str,
                 tokens: bool) -> ClassifyHead | None:
    """The classifier of an encoder; None where this table has no row."""
    place, family = PLACES.get(config["model_type"]), config["model_type"]
    if place is None:
        return None
    layers = []
    mode = "all" if tokens else place.mode
    dense = place.dense.format(base=weights.base) if place.dense else None
    if dense is not None and (not tokens or family == "modernbert"):
        layer = _linear(weights, dense, width, width, place.activation)
        if family == "modernbert":
            if config.get("classifier_activation", "gelu") != "gelu":
                return None
            norm = weights.get("head.norm.weight", (width,), torch.float32)
            bias = (weights.get("head.norm.bias", (width,), torch.float32) if "head.norm.bias" in weights else None)
            layer.norm = (norm, bias, float(config.get("norm_eps", 1e-5)))
            mode = mode if tokens else str(config.get("classifier_pooling", "cls"))
        layers.append(layer)
    last = "classifier" if tokens else place.last
    layers.append(_linear(weights, last, width, num_labels(config), "none"))
    return ClassifyHead(mode, layers, activation)


def decoder_head(weights: Weights, width: int, count: int, mode: str, activation: str,
                 tokens: bool) -> ClassifyHead:
    """The classifier of a causal model: one layer, on the last token unless told otherwise."""
    name = next((n for n in ("score", "classifier") if f"{n}.weight" in weights), None)
    if name is None:
        raise refuse(f"The model {weights.directory} has no classifier; a causal model scores by two of its tokens "
                     "with --pooler-config '{\"classifier_from_token\": [\"no\", \"yes\"]}'.")
    return ClassifyHead("all" if tokens else mode, [_linear(weights, name, width, count, "none")], activation)


def token_head(rows: torch.Tensor, activation: str) -> ClassifyHead:
    """Scores by the logits of some tokens; of two, the first is the "no" and the second the "yes" of one score."""
    weight = rows[1:] - rows[:1] if len(rows) == 2 else rows
    return ClassifyHead("last", [DenseLayer(weight.contiguous(), None)], activation)


def _linear(weights: Weights, name: str, inputs: int, outputs: int, activation: str) -> DenseLayer:
    bias = weights.get(f"{name}.bias", (outputs,), torch.float32) if f"{name}.bias" in weights else None
    return DenseLayer(weights.get(f"{name}.weight", (outputs, inputs), torch.float32), bias, activation)
