"""Rotary position embeddings by data: what config.json says about them, and their frequencies.

Used by the engine's loader. One `Rope` covers the kinds default, linear, dynamic, llama3, yarn and longrope; the tables
of cos and sin are made once for all positions that the engine serves. Must not need the model.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Config = dict[str, Any]


class Unfit(Exception):
    """The own decoder has no description that fits this model; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary embedding of `dim` leading dimensions of a head; `kind` and the rest as config.json spells them."""

    dim: int
    theta: float = 10000.0
    kind: str = "default"               # default | linear | dynamic | llama3 | yarn | longrope
    factor: float = 1.0
    original_max: int = 0               # positions seen in training, before scaling
    low_freq_factor: float = 1.0        # llama3
    high_freq_factor: float = 4.0       # llama3
    beta_fast: float = 32.0             # yarn
    beta_slow: float = 1.0              # yarn
    truncate: bool = True               # yarn
    attention_factor: float = 1.0       # yarn, longrope: cos and sin are multiplied by it
    short_factor: tuple[float, ...] = ()    # longrope, up to original_max positions
    long_factor: tuple[float, ...] = ()     # longrope, beyond


def read_rope(config: Config, params: Config, theta: float, head_dim: int) -> Rope:
    """The rope of one kind of layer from `params`, its part of config.json. Unfit for kinds that are not here."""
    kind = params.get("rope_type") or params.get("type") or "default"
    partial = params.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(head_dim * partial)
    if config["model_type"] == "phi3" and kind in ("su", "yarn"):
        kind = "longrope"
    longest = int(config["max_position_embeddings"])
    original = int(params.get("original_max_position_embeddings") or longest)
    if config.get("original_max_position_embeddings") and kind in ("llama3", "yarn", "longrope"):
        original = int(config["original_max_position_embeddings"])
    match kind:
        case "default":
            return Rope(dim=dim, theta=theta)
        case "dynamic":     # has no effect up to the trained length, which the loader does not let anyone pass
            return Rope(dim=dim, theta=theta, kind=kind, original_max=longest)
        case "linear":
            return Rope(dim=dim, theta=theta, kind=kind, factor=float(params["factor"]))
        case "llama3":
            return Rope(dim=dim, theta=theta, kind=kind, factor=float(params["factor"]), original_max=original,
                        low_freq_factor=float(params["low_freq_factor"]),
                        high_freq_factor=float(params["high_freq_factor"]))
        case "yarn":
            factor = float(params.get("factor") or longest / original)
            return Rope(dim=dim, theta=theta, kind=kind, factor=factor, original_max=original,
                        beta_fast=float(params.get("beta_fast") or 32), beta_slow=float(params.get("beta_slow") or 1),
                        truncate=bool(params.get("truncate", True)), attention_factor=_yarn_attention(params, factor))
        case "longrope":
            factor = float(params.get("factor") or longest / original)
            return Rope(dim=dim, theta=theta, kind=kind, factor=factor, original_max=original,
                        attention_factor=_longrope_attention(params, factor, original),
                        short_factor=tuple(map(float, params["short_factor"])),
                        long_factor=tuple(map(float, params["long_factor"])))
    raise Unfit(f"rope type '{kind}'")


def _yarn_attention(params: Config, factor: float) -> float:
    """YaRN's attention temperature (Peng et al. 2023, section 3.4) as it appears on cos and sin."""
    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    if params.get("mscale") and params.get("mscale_all_dim"):
        return scale(float(params["mscale"])) / scale(float(params["mscale_all_dim"]))
    return scale(1.0)


def _longrope_attention(params: Config, factor: float, original: int) -> float:
    """LongRoPE's attention temperature (Ding et al. 2024)."""
    if params.get("attention_factor") is not None:
        return float(params["attention_factor"])
    return 1.0 if factor <= 1.0 else math.sqrt(1 + math.log(factor) / math.log(original))


def frequencies(rope: Rope, longest: int) -> torch.Tensor:
    """Inverse frequencies, float32 [dim / 2], for an engine that serves up to `longest` positions.

    Computed in float32 in the order in which transformers computes them: at position 8,000 the last bit of a frequency
    is 0.0005 rad. LongRoPE's choice of factors is made once, by `longest`, so that cached keys never change.
    """
    import torch

    exponents = torch.arange(0, rope.dim, 2, dtype=torch.int64).float() / rope.dim
    powers = rope.theta ** exponents
    match rope.kind:
        case "linear":
            return (1.0 / powers) / rope.factor
        case "llama3":
            return _llama3(rope, 1.0 / powers)
        case "yarn":
            return _yarn(rope, powers)
        case "longrope":
            factors = rope.long_factor if longest > rope.original_max else rope.short_factor
            return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)
    return 1.0 / powers


def _llama3(rope: Rope, inverse: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended."""
    import torch

    wavelengths = 2 * math.pi / inverse
    longest, shortest = rope.original_max / rope.low_freq_factor, rope.original_max / rope.high_freq_factor
    stretched = torch.where(wavelengths > longest, inverse / rope.factor, inverse)
    blend = (rope.original_max / wavelengths - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (wavelengths >= shortest) & (wavelengths <= longest)
    return torch.where(between, (1 - blend) * stretched / rope.factor + blend * stretched, stretched)


def _yarn(rope: Rope, powers: torch.Tensor) -> torch.Tensor:
    """YaRN (Peng et al. 2023): a linear ramp between extrapolated and interpolated frequencies."""
    import torch

    def dimension(rotations: float) -> float:
        """The dimension that turns `rotations` times over the trained length."""
        return rope.dim * math.log(rope.original_max / (rotations * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    span = high - low if high != low else 0.001
    keep = 1 - torch.clamp((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / span, 0, 1)
    return 1.0 / (rope.factor * powers) * (1 - keep) + 1.0 / powers * keep


def tables(rope: Rope, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [longest, dim / 2], attention factor included."""
    import torch

    angles = torch.arange(longest, dtype=torch.float32)[:, None] * frequencies(rope, longest)[None, :]
    return angles.cos() * rope.attention_factor, angles.sin() * rope.attention_factor
