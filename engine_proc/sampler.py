"""Turns rows of logits into tokens and log-probabilities: batched tensor code, no loop over requests.

Order: grammars, penalties, logit bias, bans (allowed ids, bad words, end tokens before min_tokens), temperature, top_k, top_p,
min_p; a thinking budget that is used up replaces what was drawn. Log-probabilities are those of the unmodified logits
unless `mode` says otherwise. A row's token depends on its own logits, parameters and random number only, never on
its neighbours: random numbers are a hash of (seed, choice, position), and every row is drawn by inverting its own CDF
in vocabulary order, whichever filters its neighbours use. Engine process.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine_proc.bans import ban_words
from engine_proc.filters import cuts
from engine_proc.masks import Mask
from engine_proc.slots import Rows, Slots

MODES = ("raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits")     # --logprobs-mode
FEW = 8                     # best tokens among which a sampled one is expected
BLOCK = 256                 # tokens that are looked at together before single ones are
NO_ROWS = np.zeros(0, np.int64)
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(slots=True)
class Ranked:
    """Log-probabilities of n tokens and the k best alternatives of each, the last `num_extra` of which are those that
    were asked for by id. On the model's device until fetched."""

    values: torch.Tensor        # float32 [n]
    ranks: torch.Tensor         # int64 [n]; 1: the best
    top_ids: torch.Tensor       # int64 [n, k], best first
    top_values: torch.Tensor    # float32 [n, k]
    num_extra: int = 0


@dataclass(slots=True)
class Beams:
    """What beam search may go on with: the best tokens of b rows, C of each. On the model's device until fetched."""

    ids: torch.Tensor           # int64 [b, C], best first
    scores: torch.Tensor        # float32 [b, C]: log-probabilities after penalties and bias; -inf: forbidden
    values: torch.Tensor        # float32 [b, C]: log-probabilities of the unmodified logits


@dataclass(slots=True)
class Sampled:
    """What one step's sampling gave."""

    tokens: torch.Tensor                # int64 [R]
    valid: torch.Tensor                 # bool [R]: the row's logits were finite
    ranked: Ranked | None               # of the rows that want log-probabilities, in their order
    ranked_rows: np.ndarray             # which rows those are
    open: torch.Tensor | None = None    # bool [R]: some token was allowed; None: in every row
    beams: Beams | None = None          # of the rows that beam search computes, in their order


# float32 [R, V] -> tokens int64 [R], lowest of equals, and whether the row was finite, bool [R].
Argmax = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


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


def sample(logits: torch.Tensor, rows: Rows, slots: Slots, argmax: Argmax | None = None,
           mode: str = MODES[0], mask: Mask | None = None) -> Sampled:
    """Sample one token per row of `logits`, float32 [R, V], which may be changed in place.

    `argmax`: a faster one of the model's, for steps in which every row is plainly greedy; `mask`: the same for what
    grammars forbid. `mode`: one of MODES.
    """
    if argmax is not None and rows.plain:
        if rows.masks is not None:
            rows.masks.apply(logits, mask)
        tokens, valid = argmax(logits)
        return Sampled(tokens, valid, None, NO_ROWS)
    wanted, searched = np.flatnonzero(rows.logprobs >= 0), np.flatnonzero(rows.beam)
    device = logits.device
    valid = torch.isfinite(logits.sum(dim=-1))
    if rows.masks is not None:
        rows.masks.apply(logits, mask)
    raw = logits
    if len(searched):           # penalties and bias work on log-probabilities there, as in transformers
        index = torch.from_numpy(searched).to(device)
        raw, logits = logits, logits.clone()
        logits[index] = torch.log_softmax(logits[index], dim=-1)
    adjusted = adjust(logits, rows, slots, keep=len(wanted) > 0 and not len(searched) and mode.startswith("raw"))
    random = np.flatnonzero(rows.temperature > 0)
    if not len(random):
        tokens = adjusted.argmax(dim=-1)
    else:
        uniform = torch.from_numpy(uniforms(rows.seed[random], rows.choice[random], rows.position[random]))
        if len(random) == len(logits):
            tokens = invert(weigh(adjusted, rows, random), uniform.to(device))
        else:
            tokens = adjusted.argmax(dim=-1)
            index = torch.from_numpy(random).to(device)
            tokens[index] = invert(weigh(adjusted[index], rows, random), uniform.to(device))
    allowed = adjusted.gather(1, tokens[:, None])[:, 0] > float("-inf") if rows.banning else None
    bounded = np.flatnonzero(rows.thinking >= 0)
    if len(bounded):
        tokens = slots.thinking.apply(tokens, bounded, rows.thinking[bounded])
    slots.note(rows, tokens)
    ranked = None
    if len(wanted):
        index = torch.from_numpy(wanted).to(device)
        shown = raw[index] if mode.startswith("raw") else processed(adjusted[index], rows, wanted)
        ranked = rank(shown, tokens[index], int(rows.logprobs.max()), _extra(rows, wanted), mode.endswith("logprobs"))
    return Sampled(tokens, valid, ranked, wanted, allowed, beams(raw, adjusted, rows, searched))


def _extra(rows: Rows, wanted: np.ndarray) -> np.ndarray | None:
    """The further ids of the rows `wanted`, int64 [n, m], filled up with 0; None without any."""
    if not rows.extra:
        return None
    ids = np.zeros((len(wanted), max(len(ids) for _, ids in rows.extra)), np.int64)
    for row, some in rows.extra:
        ids[np.searchsorted(wanted, row), :len(some)] = some
    return ids


def beams(raw: torch.Tensor, adjusted: torch.Tensor, rows: Rows, searched: np.ndarray) -> Beams | None:
    """Candidates of the rows `searched`: of each as many as the one that wants most."""
    if not len(searched):
        return None
    index = torch.from_numpy(searched).to(raw.device)
    scores, ids = largest(adjusted[index], int(rows.beam.max()))
    return Beams(ids, scores, torch.log_softmax(raw[index], dim=-1).gather(1, ids))


def processed(adjusted: torch.Tensor, rows: Rows, which: np.ndarray) -> torch.Tensor:
    """Rows `which` as they are sampled from, float32 [n, V]: over the temperature, -inf where they are cut."""
    out = adjusted.clone()
    random = np.flatnonzero(rows.temperature[which] > 0)
    if len(random):
        index = torch.from_numpy(random).to(out.device)
        some, numbers = out[index], which[random]
        weights = weigh(some, rows, numbers)
        some = some / torch.from_numpy(rows.temperature[numbers]).to(out.device).unsqueeze(1)
        out[index] = some.masked_fill_(weights == 0, float("-inf"))
    return out


def rank(logits: torch.Tensor, tokens: torch.Tensor, k: int, extra: np.ndarray | None = None,
         normalise: bool = True) -> Ranked:
    """Log-probabilities of `tokens`, int64 [n], under rows of logits, float32 [n, V], of the k best, and of `extra`
    ids of each row, int64 [n, m], which follow the k best. Not `normalise`: the logits themselves."""
    chosen = logits.gather(1, tokens[:, None])
    values, ids = largest(logits, min(max(k, FEW), logits.shape[1]))
    better = (values > chosen).sum(dim=-1)
    far = (better == values.shape[1]).nonzero()[:, 0]       # not among those: count the whole row
    if len(far):
        better[far] = (logits[far] > chosen[far]).sum(dim=-1)
    k = min(k, logits.shape[1])
    ids, values = ids[:, :k], values[:, :k]
    if extra is not None:
        more = torch.from_numpy(extra).to(logits.device)
        ids, values = torch.cat([ids, more], dim=1), torch.cat([values, logits.gather(1, more)], dim=1)
    if normalise:               # rounding must not lift a log-probability above 0
        normaliser = torch.logsumexp(logits, dim=-1, keepdim=True)
        chosen, values = (chosen - normaliser).clamp_(max=0.0), (values - normaliser).clamp_(max=0.0)
    return Ranked(chosen[:, 0], better + 1, ids, values, 0 if extra is None else extra.shape[1])


def largest(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row and where they are, [n, k] each: they lie in the k blocks with the largest maxima."""
    n, vocab = logits.shape
    whole = vocab // BLOCK
    if k == 0 or whole < 4 * k:
        best = logits.topk(k, dim=-1)
        return best.values, best.indices
    blocks = logits[:, :whole * BLOCK].unflatten(1, (whole, BLOCK))
    chosen = blocks.amax(dim=-1).topk(k, dim=-1).indices                                    # [n, k]
    ids = (chosen.unsqueeze(-1) * BLOCK + torch.arange(BLOCK, device=logits.device)).flatten(1)
    rest = torch.arange(whole * BLOCK, vocab, device=logits.device).expand(n, -1)
    ids = torch.cat([ids, rest], dim=1)
    best = logits.gather(1, ids).topk(k, dim=-1)
    return best.values, ids.gather(1, best.indices)


def adjust(logits: torch.Tensor, rows: Rows, slots: Slots, keep: bool) -> torch.Tensor:
    """Penalties, bias and bans. In place unless the unmodified logits have to be kept."""
    penalised = np.flatnonzero(rows.penalty >= 0)
    if not (len(penalised) or rows.forbidding):
        return logits
    out = logits.clone() if keep else logits
    device = logits.device
    if len(penalised):
        index = torch.from_numpy(penalised).to(device).unsqueeze(1)
        table = torch.from_numpy(rows.penalty[penalised]).to(device).unsqueeze(1)
        repetition, frequency, presence = (
            torch.from_numpy(values[penalised]).to(device).unsqueeze(1)
            for values in (rows.repetition, rows.frequency, rows.presence))
        seen = slots.histories.whole(rows.history[penalised])   # [p, L]: only these change
        counts, some = slots.counts[table, seen], out[index, seen]
        repeated = torch.where(some > 0, some / repetition, some * repetition)
        # A token that was seen twice is written twice, with the same value.
        out[index, seen] = repeated - frequency * counts - presence * (counts > 0)
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
    limited = np.flatnonzero(rows.allowed >= 0)
    if len(limited):
        slots.allowed.apply(out, limited, rows.allowed[limited])
    if rows.words:
        ban_words(out, rows.words, slots.histories)
    return out


def weigh(logits: torch.Tensor, rows: Rows, which: np.ndarray) -> torch.Tensor:
    """What each token weighs in the draw, float32 [n, V], the best 1, those that are cut 0.

    The parameters of `logits` [n, V] are rows `which` of `rows`.
    """
    device = logits.device
    weights = logits / torch.from_numpy(rows.temperature[which]).to(device).unsqueeze(1)
    weights = weights.sub_(weights.amax(dim=-1, keepdim=True)).exp_()       # relative to the best token
    min_p, top_k, top_p = rows.min_p[which], rows.top_k[which], rows.top_p[which]
    least = torch.from_numpy(min_p).to(device).unsqueeze(1)
    filtered = np.flatnonzero(((top_k > 0) & (top_k < logits.shape[1])) | (top_p < 1))
    if len(filtered):
        index = torch.from_numpy(filtered).to(device)
        some = weights if len(filtered) == len(weights) else weights[index]
        least[index] = torch.maximum(least[index], cuts(some, top_k[filtered], top_p[filtered]))
    if len(filtered) or (min_p > 0).any():
        weights.masked_fill_(weights < least, 0.0)
    return weights


def invert(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token at which the CDF of `weights`, float32 [n, V] (unnormalised), passes `uniform`, float64 [n].

    Two levels, blocks and then the tokens of one block, so that no running sum over the vocabulary is needed. A token
    of weight zero is never returned; for a row that is not a number, some id of the vocabulary is.
    """
    n, vocab = weights.shape
    blocks = -(-vocab // BLOCK)
    if vocab % BLOCK:
        weights = torch.nn.functional.pad(weights, (0, blocks * BLOCK - vocab))
    blocked = weights.view(n, blocks, BLOCK)
    cdf = blocked.sum(dim=-1).double().cumsum(dim=-1)
    target = (uniform * cdf[:, -1]).unsqueeze(1)
    block = (cdf <= target).sum(dim=-1).clamp_(max=blocks - 1)
    inside = blocked[torch.arange(n, device=weights.device), block].double()
    before = torch.nn.functional.pad(cdf, (1, 0)).gather(1, block.unsqueeze(1))     # never above the target
    token = (inside.cumsum(dim=-1) + before <= target).sum(dim=-1)
    positive = inside > 0
    order = torch.arange(BLOCK, device=weights.device)
    last = torch.where(positive, order, 0).amax(dim=-1)
    token = torch.minimum(token, last)          # rounding may put the target a hair behind the block's own sum
    return (block * BLOCK + token).clamp_(max=vocab - 1)
