"""The encoder's products: fifteen hundred rows at a time, which torch's own libraries do best.

Engine process. Float32 and bfloat16 as they are; int8 with a scale per output of the weights, which are quantised once,
and one per call for the activations (oneDNN's VNNI products, two to three times as fast as float32).
"""
from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F

from pipeline.errors import StartError
from pipeline.exits import CONFIG

Affine = tuple[torch.Tensor, torch.Tensor | None]
Product = Callable[[torch.Tensor], torch.Tensor]
ENGINE = "onednn"


def plain(layer: Affine) -> Product:
    """The weights as they are."""
    weight, bias = layer
    return lambda x: F.linear(x, weight, bias)


def int8(layer: Affine) -> Product:
    """The weights in eight bits; StartError where this build of torch has no such products."""
    if ENGINE not in torch.backends.quantized.supported_engines:
        raise StartError(CONFIG, "--quantization int8 needs a build of torch with oneDNN.")
    torch.backends.quantized.engine = ENGINE
    weight, bias = (None if part is None else part.float() for part in layer)
    assert weight is not None
    scales = weight.abs().amax(dim=1).clamp_(min=1e-12) / 127
    with warnings.catch_warnings():                # torch means to move these operators to another package
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_channel(weight, scales, torch.zeros(len(weight), dtype=torch.int64), 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, bias)
    return lambda x: torch.ops.quantized.linear_dynamic(x.float(), packed, False).to(x.dtype)
