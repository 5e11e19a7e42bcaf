"""Turns rows of logits into tokens and log-probabilities: batched tensor code, no loop over requests.

Order: penalties, logit bias, ban of end tokens (min_tokens), temperature, top_k, top_p, min_p. Log-probabilities are
those of the unmodified logits. A row's token depends on its own logits, parameters and random number only, never on
its neighbours: random numbers are a hash of (seed, choice, position), and every row is drawn by inverting its own CDF
in vocabulary order, whichever filters its neighbours use. Engine process.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.slots import Rows, Slots

PREFILTER = 1024            # top_p looks at this many best tokens before it sorts the whole vocabulary
CDF_BLOCK = 256             # tokens whose probabilities are summed before the CDF is searched
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class Ranked:
    """Log-probabilities of n tokens and the k best alternatives of each. On the model's device until fetched."""

    values: torch.Tensor        # float32 [n]
    ranks: torch.Tensor         # int64 [n]; 1: the best
    top_ids: torch.Tensor       # int64 [n, k], best first
    top_values: torch.Tensor    # float32 [n, k]


@dataclass(slots=True)
class Sampled:
    """What one step's sampling gave."""

    tokens: torch.Tensor                # int64 [R]
    valid: torch.Tensor                 # bool [R]: the row's logits were finite
    ranked: Ranked | None               # of the rows that want log-probabilities, in their order
    ranked_rows: np.ndarray             # which rows those are


def mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection of uint64 whose output bits look independent."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniforms(seed: np.ndarray, choice: np.ndarray, position: np.ndarray) -> np.ndarray:
    """float64 in (0, 1), one per row, a pure function of the row's three numbers (53 bits are used)."""
    state = mix(seed.astype(np.uint64) + _GOLDEN)
    state = mix(state ^ mix((choice.astype(np.uint64) + np.uint64(1)) * _GOLDEN))
    state = mix(state + (position.astype(np.uint64) + np.uint64(1)) * _GOLDEN)
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0 ** -53


def sample(logits: torch.Tensor, rows: Rows, slots: Slots) -> Sampled:
    """Sample one token per row of `logits`, float32 [R, V], which may be changed in place."""
    valid = torch.isfinite(logits.sum(dim=-1))
    wanted = np.flatnonzero(rows.logprobs >= 0)
    adjusted = adjust(logits, rows, slots, keep=len(wanted) > 0)
    random = np.flatnonzero(rows.temperature > 0)
    if not len(random):
        tokens = adjusted.argmax(dim=-1)
    else:
        uniform = torch.from_numpy(uniforms(rows.seed[random], rows.choice[random], rows.position[random]))
        if len(random) == len(logits):
            tokens = draw(adjusted, rows, random, uniform)
        else:
            tokens = adjusted.argmax(dim=-1)
            index = torch.from_numpy(random).to(logits.device)
            tokens[index] = draw(adjusted[index], rows, random, uniform)
    slots.count(rows, tokens)
    ranked = None
    if len(wanted):
        index = torch.from_numpy(wanted).to(logits.device)
        raw = logits if len(wanted) == len(logits) else logits[index]
        ranked = rank(raw, tokens[index], int(rows.logprobs.max()))
    return Sampled(tokens, valid, ranked, wanted)


def rank(logits: torch.Tensor, tokens: torch.Tensor, k: int) -> Ranked:
    """Log-probabilities of `tokens`, int64 [n], under rows of unmodified logits, float32 [n, V], and the k best."""
    normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
    chosen = logits.gather(1, tokens[:, None])
    best = logits.topk(min(k, logits.shape[1]), dim=-1)
    return Ranked(
        values=(chosen - normaliser)[:, 0], ranks=(logits > chosen).sum(dim=-1) + 1, top_ids=best.indices,
        top_values=best.values - normaliser)


def adjust(logits: torch.Tensor, rows: Rows, slots: Slots, keep: bool) -> torch.Tensor:
    """Penalties, bias and banned ends. In place unless the unmodified logits have to be kept."""
    penalised = np.flatnonzero(rows.penalty >= 0)
    if not (len(penalised) or rows.bias or rows.banned):
        return logits
    out = logits.clone() if keep else logits
    device = logits.device
    if len(penalised):
        index = torch.from_numpy(penalised).to(device)
        table = torch.from_numpy(rows.penalty[penalised]).to(device)
        repetition, frequency, presence = (
            torch.from_numpy(values[penalised]).to(device).unsqueeze(1)
            for values in (rows.repetition, rows.frequency, rows.presence))
        counts, some = slots.counts[table], out[index]
        in_output = counts > 0
        repeated = torch.where(some > 0, some / repetition, some * repetition)
        some = torch.where(in_output | slots.in_prompt[table], repeated, some)
        out[index] = some - frequency * counts - presence * in_output
    if rows.bias:
        which = np.concatenate([np.full(len(ids), row) for row, ids, _ in rows.bias])
        ids = np.concatenate([ids for _, ids, _ in rows.bias])
        values = np.concatenate([values for _, _, values in rows.bias])
        where = (torch.from_numpy(which).to(device), torch.from_numpy(ids).to(device))
        out.index_put_(where, torch.from_numpy(values).to(device), accumulate=True)
    if rows.banned:
        which = np.concatenate([np.full(len(ids), row) for row, ids in rows.banned])
        ids = np.concatenate([ids for _, ids in rows.banned])
        out[torch.from_numpy(which).to(device), torch.from_numpy(ids).to(device)] = float("-inf")
    return out


def draw(logits: torch.Tensor, rows: Rows, which: np.ndarray, uniform: torch.Tensor) -> torch.Tensor:
    """One token per row of `logits` [n, V], whose parameters are rows `which` of `rows`; uniform: float64 [n]."""
    device = logits.device
    scaled = logits / torch.from_numpy(rows.temperature[which]).to(device).unsqueeze(1)
    best = scaled.amax(dim=-1, keepdim=True)
    lowest = torch.full_like(best, float("-inf"))
    min_p = rows.min_p[which]
    if (min_p > 0).any():
        lowest = best + torch.from_numpy(min_p).to(device).log().unsqueeze(1)
    top_k, top_p = rows.top_k[which], rows.top_p[which]
    filtered = np.flatnonzero(((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1))
    if len(filtered):
        index = torch.from_numpy(filtered).to(device)
        some = scaled if len(filtered) == len(scaled) else scaled[index]
        cut = thresholds(some, top_k[filtered], top_p[filtered])
        lowest[index] = torch.maximum(lowest[index], cut)
    weights = (scaled - best).exp_()
    if len(filtered) or (min_p > 0).any():
        weights.masked_fill_(scaled < lowest, 0.0)
    return invert(weights, uniform.to(device))


def thresholds(logits: torch.Tensor, top_k: np.ndarray, top_p: np.ndarray, best: int = PREFILTER) -> torch.Tensor:
    """The least logit, [n, 1], that top_k and then top_p (of what top_k left) keep; equal logits stay together.

    Only the `best` largest logits are sorted; rows whose nucleus is wider (a flat distribution) sort everything.
    """
    device, vocab = logits.device, logits.shape[1]
    kept = np.where(top_k > 0, np.minimum(top_k, vocab), vocab)
    unlimited = kept == vocab
    width = min(vocab, max(int(kept[~unlimited].max(initial=1)), best if unlimited.any() else 1))
    values = logits.topk(width, dim=-1).values
    weights = (values - values[:, :1]).exp()
    cumulative = weights.double().cumsum(dim=-1)
    limit = torch.from_numpy(np.minimum(kept, width)).to(device).unsqueeze(1)
    total = cumulative.gather(1, limit - 1)
    if unlimited.any() and width < vocab:
        everything = (logits - values[:, :1]).exp_().sum(dim=-1, keepdim=True, dtype=torch.float64)
        total = torch.where(torch.from_numpy(unlimited).to(device).unsqueeze(1), everything, total)
    target = total * torch.from_numpy(top_p).to(device).unsqueeze(1)
    nucleus = (cumulative < target).sum(dim=-1, keepdim=True) + 1
    nucleus = torch.where(torch.from_numpy(top_p < 1).to(device).unsqueeze(1), nucleus, limit)
    out = values.gather(1, torch.minimum(nucleus, limit) - 1)
    if width < vocab:
        wide = np.flatnonzero(unlimited & (nucleus[:, 0] > width).cpu().numpy())
        if len(wide):
            index = torch.from_numpy(wide).to(device)
            out[index] = thresholds(logits[index], top_k[wide], top_p[wide], vocab)
    return out


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token at which the CDF of `weights`, float32 [n, V] (unnormalised), passes `uniform`, float64 [n].

    Two levels, blocks and then the tokens of one block, so that no running sum over the vocabulary is needed. A token
    of weight zero is never returned; for a row that is not a number, some id of the vocabulary is.
    """
    n, vocab = weights.shape
    blocks = -(-vocab // CDF_BLOCK)
    if vocab % CDF_BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * CDF_BLOCK - vocab))
    blocked = weights.view(n, blocks, CDF_BLOCK)
    cdf = blocked.sum(dim=-1).double().cumsum(dim=-1)
    target = (uniform * cdf[:, -1]).unsqueeze(1)
    block = (cdf <= target).sum(dim=-1).clamp_(max=blocks - 1)
    inside = blocked[torch.arange(n, device=weights.device), block].double()
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block.unsqueeze(1))     # never above the target
    token = (inside.cumsum(dim=-1) + before <= target).sum(dim=-1)
    positive = inside > 0
    order = torch.arange(CDF_BLOCK, device=weights.device)
    last = torch.where(positive, order, 0).amax(dim=-1)
    token = torch.minimum(token, last)          # rounding may put the target a hair behind the block's own sum
    return (block * CDF_BLOCK + token).clamp_(max=vocab - 1)
