"""Each kernel in plain torch: what the compiled ones are tested against and what runs where there is no compiler.

Owns: the meaning of the kernels. Written for clarity first; shapes, types and units are those of `api.py`. Arithmetic
is in float32 (or the input's float64, for tests) and rounded once to the output's type.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_WEIGHTS, INT8_ROWS = 64, 32  # inputs that share one scale: of an output's weights, of a row's activations


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K], plus bias."""
    return F.linear(_wide(x), _wide(weight), None if bias is None else _wide(bias)).to(x.dtype)


def quantize(x: Tensor, size: int, narrow: bool = False) -> tuple[Tensor, Tensor]:
    """x [T, K] -> integers (as float32) [T, G, size] and float32 scales [T, G]: symmetric groups of `size` values of K.

    K is padded with zeros to whole groups of 64. `narrow`: the scales are bfloat16 numbers, rounded up.
    """
    groups = F.pad(x.float(), (0, -x.shape[1] % INT8_WEIGHTS)).unflatten(1, (-1, size))
    scales = groups.abs().amax(dim=2) / 127
    if narrow:
        scales = ((scales.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    return (groups * torch.where(scales > 0, 1 / scales, 0.0)[..., None]).round(), scales


def dequantized(weight: Tensor) -> Tensor:
    """weight [N, K] -> float32 [N, K] as the int8 layer sees it."""
    values, scales = quantize(weight, INT8_WEIGHTS, narrow=True)
    return (values * scales[..., None]).flatten(1)[:, : weight.shape[1]]


def linear_int8(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] times weight [N, K], both quantised."""
    values, scales = quantize(x, INT8_ROWS)
    seen = (values * scales[..., None]).flatten(1)[:, : x.shape[1]]
    out = F.linear(seen.double(), dequantized(weight).double())
    return (out if bias is None else out + bias.double()).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension."""
    wide = _wide(x)
    factor = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * factor * _wide(weight)).to(x.dtype)


def act_mul(x: Tensor, act: str) -> Tensor:
    """x [T, 2 * I] -> act(first half) * second half."""
    gate, up = _wide(x).chunk(2, dim=-1)
    return (activate(gate, act) * up).to(x.dtype)


def activate(x: Tensor, act: str) -> Tensor:
    """The activation of that name."""
    match act:
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "tanh":
            return torch.tanh(x)
    assert act == "silu"
    return F.silu(x)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / deviation * weight + bias over the last dimension."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * _wide(weight)
    return (out if bias is None else out + _wide(bias)).to(x.dtype)


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    head_dim: int,
    *,
    scale: float,
    window: int = 0,
    bias: Tensor | None = None,
    span: int = 0,
) -> Tensor:
    """q [T, H * D], k and v [T, Hkv * D]: every token sees its own sequence, both sides of it."""
    group = q.shape[1] // k.shape[1]
    parts = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist()):
        heads = [t[start:end].unflatten(1, (-1, head_dim)).transpose(0, 1) for t in (q, k, v)]
        keys, values = (t.repeat_interleave(group, 0) for t in heads[1:])
        scores = heads[0] @ keys.transpose(1, 2) * scale
        here = torch.arange(end - start)
        apart = here[None, :] - here[:, None]
        if bias is not None:
            scores = scores + bias[:, apart + span - 1]
        if window:
            scores = scores.masked_fill(apart.abs() > window, -torch.inf)
        parts.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    return torch.cat(parts)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] with its first 2 * half elements rotated by cos, sin [T, half]."""
    half = cos.shape[-1]
    wide = _wide(x)
    a, b, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    c, s = cos[:, None], sin[:, None]
    return torch.cat((a * c - b * s, b * c + a * s, rest), dim=-1).to(x.dtype)


def rope_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor | None,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """See `Kernels.rope_cache`."""
    kv_heads, dim = k_cache.shape[2:]
    for x, norm in ((q, q_norm), (k, k_norm)):
        heads = x.unflatten(1, (-1, dim))
        wide = _wide(heads)
        if norm is not None:
            wide = rms_norm(wide, norm, eps)
        if cos is not None and sin is not None:
            at = positions.long()
            wide = rotate(wide, cos[at], sin[at])
        if wide is not heads:
            heads.copy_(wide)
    if slots is not None:
        rows = (slots >= 0).nonzero()[:, 0]
        where = slots[rows].long()
        for cache, new in ((k_cache, k), (v_cache, v)):
            cache.view(-1, kv_heads, dim)[where] = new[rows].unflatten(1, (kv_heads, dim)).to(cache.dtype)


def attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    causal: bool = True,
) -> Tensor:
    """See `Kernels.attention`; one sequence at a time over gathered keys and values."""
    block_size, kv_heads, dim = k_cache.shape[1:]
    out = torch.empty_like(q)
    queries, results = q.view(q.shape[0], -1, dim), out.view(q.shape[0], -1, dim)
    group = queries.shape[1] // kv_heads
    starts, contexts = query_starts.tolist(), context_lens.tolist()
    for s, context in enumerate(contexts):
        lo, hi = starts[s], starts[s + 1]
        if lo == hi:
            continue
        me = torch.arange(context - (hi - lo), context)[:, None]
        first = max(0, int(me[0]) - window + 1) if window else 0
        token = torch.arange(first, context)
        slot = block_tables[s].long()[token // block_size] * block_size + token % block_size
        keys = _wide(k_cache.view(-1, kv_heads, dim)[slot]).repeat_interleave(group, dim=1)
        values = _wide(v_cache.view(-1, kv_heads, dim)[slot]).repeat_interleave(group, dim=1)
        scores = torch.einsum("thd,shd->hts", _wide(queries[lo:hi]).to(keys.dtype), keys) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = torch.zeros(hi - lo, context - first, dtype=torch.bool)
        if causal:
            hidden |= token > me
        if window:
            hidden |= token <= me - window
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        results[lo:hi] = torch.einsum("hts,shd->thd", weights, values).to(q.dtype)
    return out


def mask(logits: Tensor, which: Tensor, allowed: Tensor) -> None:
    """See `Kernels.mask`."""
    bits = (allowed.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32, device=allowed.device)) & 1
    logits[which] = logits[which].masked_fill_(bits.flatten(1)[:, :logits.shape[1]] == 0, float("-inf"))


def argmax(logits: Tensor, logprobs: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """See `Kernels.argmax`."""
    wide = _wide(logits)
    nan = wide.isnan().any(dim=-1)
    best = wide.amax(dim=-1, keepdim=True)
    ids = (wide == best).int().argmax(dim=-1)
    chosen = (best[:, 0] - wide.logsumexp(-1)).float() if logprobs else None
    return ids.int(), chosen, nan
