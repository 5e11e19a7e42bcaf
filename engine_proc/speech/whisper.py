"""Whisper with our own layers: encoder windows, and a decoder over packed rows with paged self-attention.

Engine process. Cross-attention keys and values are computed once per window and stay in its slot; self-attention reads
the block pool's paged cache. Linear layers go through `layers.Ops`, attention through `caches.py`: C kernels where
there are some, torch otherwise. Weight names are those of the Hugging Face checkpoints (Radford et al. 2022).
"""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from engine_proc.checkpoint import refuse
from engine_proc.kernels import Kernels
from engine_proc.layers import Linear, Ops
from engine_proc.speech.caches import CrossCache, SelfCache
from engine_proc.speech.net import SpeechBatch
from engine_proc.speech.products import Affine, Product, plain
from engine_proc.weights import Weights

EPS = 1e-5
LANES = 4                               # windows that are encoded side by side, at most
LANE_WEIGHTS = 100_000_000              # of an encoder; a larger one has products that keep all threads busy
Argmax = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhisperShape:
    """The sizes of a checkpoint, from its config.json."""

    width: int
    mels: int
    frames: int                         # encoder positions of a window (1500 for 30 s)
    positions: int                      # decoder positions (448)
    vocab: int
    encoder_layers: int
    encoder_heads: int
    encoder_mlp: int
    decoder_layers: int
    decoder_heads: int
    decoder_mlp: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> WhisperShape:
        """StartError for a variant that is none of Whisper's."""
        if config.get("activation_function", "gelu") != "gelu" or config.get("scale_embedding"):
            raise refuse("This Whisper checkpoint uses another activation or scaled embeddings, which is not supported.")
        try:
            return cls(
                width=config["d_model"], mels=config["num_mel_bins"], frames=config["max_source_positions"],
                positions=config["max_target_positions"], vocab=config["vocab_size"],
                encoder_layers=config["encoder_layers"], encoder_heads=config["encoder_attention_heads"],
                encoder_mlp=config["encoder_ffn_dim"], decoder_layers=config["decoder_layers"],
                decoder_heads=config["decoder_attention_heads"], decoder_mlp=config["decoder_ffn_dim"])
        except KeyError as missing:
            raise refuse(f"The configuration of this Whisper checkpoint lacks {missing}.") from None

    @property
    def head_dim(self) -> int:
        return self.width // self.decoder_heads


@dataclass(slots=True)
class EncoderLayer:
    """Products of whole windows: see products.py."""

    attn_norm: Affine
    qkv: Product
    out: Product
    mlp_norm: Affine
    up: Product
    down: Product


@dataclass(slots=True)
class DecoderLayer:
    self_norm: Affine
    qkv: Linear
    self_out: Linear
    cross_norm: Affine
    cross_q: Linear
    cross_out: Linear
    mlp_norm: Affine
    up: Linear
    down: Linear


@dataclass(slots=True)
class Lane:
    """The encoder's products for one of the threads that encode side by side: quantised ones keep state of their own."""

    layers: list[EncoderLayer]
    cross_kv: list[Product]             # of each decoder layer


class Whisper:
    """Implements net.SpeechNet. `pack` makes the encoder's products; `threads`: what torch uses while it encodes.

    Several windows are encoded side by side, each by its share of the threads: where threads share the products of one
    window, all wait at each for the one that the system has paused. With `short` kernels the encoder attends in sixteen
    bits.
    """

    def __init__(self, shape: WhisperShape, weights: Weights, ops: Ops, pack: Callable[[Affine], Product],
                 self_cache: SelfCache, cross: CrossCache, argmax: Argmax, threads: int, short: Kernels | None = None) -> None:
        self.shape, self.vocab_size, self.ops, self._pack = shape, shape.vocab, ops, pack
        self.self_cache, self.cross, self.argmax = self_cache, cross, argmax
        self._threads, self._short = threads, short
        width, get = shape.width, _Getter(weights)
        self._conv = [(get(f"encoder.conv{n}.weight", width, inputs, 3), get(f"encoder.conv{n}.bias", width))
                      for n, inputs in ((1, shape.mels), (2, width))]
        self._encoder_positions = get("encoder.embed_positions.weight", shape.frames, width)
        large = shape.encoder_layers * shape.width * (4 * shape.width + 2 * shape.encoder_mlp) > LANE_WEIGHTS
        self.num_lanes = 1 if large else min(LANES, threads)
        self._lanes = [self._lane(get) for _ in range(1 if pack is plain else self.num_lanes)]
        self._lanes *= self.num_lanes // len(self._lanes)
        self._team = ThreadPoolExecutor(max(self.num_lanes, min(threads, shape.encoder_heads)), "encode")
        self._encoder_norm = get.affine("encoder.layer_norm", width)
        self.embedding = get("decoder.embed_tokens.weight", shape.vocab, width)
        self._positions = get("decoder.embed_positions.weight", shape.positions, width)
        self._decoder = [self._decoder_layer(get, f"decoder.layers.{n}.") for n in range(shape.decoder_layers)]
        self._norm = get.affine("decoder.layer_norm", width)
        head = get("proj_out.weight", shape.vocab, width, own=True) if "proj_out.weight" in weights else self.embedding
        self._head = ops.pack(head, None)

    def _lane(self, get: _Getter) -> Lane:
        shape = self.shape
        return Lane(layers=[self._encoder_layer(get, f"encoder.layers.{n}.") for n in range(shape.encoder_layers)],
                    cross_kv=[self._pack(get.qkv(f"decoder.layers.{n}.encoder_attn.", shape.width, "kv"))
                              for n in range(shape.decoder_layers)])

    def _encoder_layer(self, get: _Getter, at: str) -> EncoderLayer:
        width, mlp, pack = self.shape.width, self.shape.encoder_mlp, self._pack
        return EncoderLayer(
            attn_norm=get.affine(at + "self_attn_layer_norm", width),
            qkv=pack(get.qkv(at + "self_attn.", width, "qkv")),
            out=pack(get.linear(at + "self_attn.out_proj", width, width)),
            mlp_norm=get.affine(at + "final_layer_norm", width),
            up=pack(get.linear(at + "fc1", mlp, width)), down=pack(get.linear(at + "fc2", width, mlp)))

    def _decoder_layer(self, get: _Getter, at: str) -> DecoderLayer:
        width, mlp, pack = self.shape.width, self.shape.decoder_mlp, self.ops.pack
        return DecoderLayer(
            self_norm=get.affine(at + "self_attn_layer_norm", width),
            qkv=pack(*get.qkv(at + "self_attn.", width, "qkv")),
            self_out=pack(*get.linear(at + "self_attn.out_proj", width, width)),
            cross_norm=get.affine(at + "encoder_attn_layer_norm", width),
            cross_q=pack(*get.qkv(at + "encoder_attn.", width, "q")),
            cross_out=pack(*get.linear(at + "encoder_attn.out_proj", width, width)),
            mlp_norm=get.affine(at + "final_layer_norm", width),
            up=pack(*get.linear(at + "fc1", mlp, width)), down=pack(*get.linear(at + "fc2", width, mlp)))

    # ---- encoder -------------------------------------------------------------------------------------------------

    def encode(self, slots: list[int], inputs: list[np.ndarray]) -> None:
        """`inputs`: log-mel features, float32 [mels, 2 * frames] each, at most `num_lanes` of them."""
        jobs = list(zip(slots, inputs, strict=True))
        if len(jobs) == 1:
            try:
                self._encode(self._lanes[0], *jobs[0], self._threads)
            finally:
                torch.set_num_threads(self.ops_threads)
            return
        assert len(jobs) <= self.num_lanes
        share = self._threads // len(jobs)
        given = [self._team.submit(self._encode, lane, *job, share) for lane, job in zip(self._lanes, jobs)]
        wait(given)
        for done in given:
            done.result()

    @property
    def ops_threads(self) -> int:
        """Torch's threads beside the kernels, which have a team of their own."""
        return 1 if self.ops.name == "kernels" else self._threads

    @torch.inference_mode()
    def _encode(self, lane: Lane, slot: int, features: np.ndarray, threads: int) -> None:
        torch.set_num_threads(threads)                                      # of this thread's own operators
        x = torch.from_numpy(np.ascontiguousarray(features)).to(self.embedding.dtype).unsqueeze(0)
        for (weight, bias), stride in zip(self._conv, (1, 2), strict=True):
            x = F.gelu(F.conv1d(x, weight, bias, stride=stride, padding=1))
        x = x[0].t() + self._encoder_positions                              # [frames, width]
        alone = threads == self._threads
        for layer in lane.layers:
            x += layer.out(self._attend(layer.qkv(_norm(x, layer.attn_norm)), alone))
            x += layer.down(F.gelu(layer.up(_norm(x, layer.mlp_norm))))
        x = _norm(x, self._encoder_norm)
        for number, cross_kv in enumerate(lane.cross_kv):
            k, v = cross_kv(x).view(len(x), 2, self.shape.decoder_heads, -1).unbind(1)
            self.cross.write(number, slot, k, v)

    def _attend(self, qkv: torch.Tensor, alone: bool) -> torch.Tensor:
        """[frames, 3 * width] -> [frames, width]. `alone`: no other window is encoded meanwhile."""
        heads, width = self.shape.encoder_heads, self.shape.width
        if self._short is None:
            # Heads that lie apart attend a quarter faster than those side by side.
            apart = qkv.view(len(qkv), 3, 1, heads, -1).permute(1, 2, 3, 0, 4).contiguous()
            return F.scaled_dot_product_attention(*apart)[0].transpose(0, 1).reshape(len(qkv), -1)
        kernels, dim = self._short, width // heads
        q, k, v = qkv.float().split(width, dim=1)
        out = torch.empty(len(qkv), width)

        def run(some: range) -> None:
            kernels.int16_attention(q, k, v, dim, scale=dim ** -0.5, heads=some, out=out)
        if alone:
            list(self._team.map(run, (range(head, head + 1) for head in range(heads))))
        else:
            run(range(heads))
        return out.to(qkv.dtype)

    # ---- decoder -------------------------------------------------------------------------------------------------

    def forward(self, batch: SpeechBatch) -> torch.Tensor:
        model, ops = batch.model, self.ops
        x = self.embedding[model.ids] + self._positions[model.positions]
        plan, cross = self.self_cache.plan(model), self.cross.plan(model.attention, batch.slots)
        for number, layer in enumerate(self._decoder):
            qkv = ops.linear(_norm(x, layer.self_norm), layer.qkv)
            x += ops.linear(self.self_cache.attend(number, qkv, plan), layer.self_out)
            q = ops.linear(_norm(x, layer.cross_norm), layer.cross_q)
            x += ops.linear(self.cross.attend(number, q, cross), layer.cross_out)
            x += ops.linear(F.gelu(ops.linear(_norm(x, layer.mlp_norm), layer.up)), layer.down)
        return _norm(x[model.rows], self._norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.ops.linear(hidden, self._head).float()

    def attention_weights(self, slot: int, ids: list[int], heads: list[tuple[int, int]], frames: int) -> torch.Tensor:
        """A causal pass over one whole sequence, without the paged cache."""
        ops, shape = self.ops, self.shape
        tokens = torch.tensor(ids)
        x = self.embedding[tokens] + self._positions[:len(ids)]
        found: list[torch.Tensor] = []
        for number in range(max(layer for layer, _ in heads) + 1):
            layer = self._decoder[number]
            qkv = ops.linear(_norm(x, layer.self_norm), layer.qkv)
            q, k, v = qkv.view(len(x), 3, shape.decoder_heads, -1).permute(1, 2, 0, 3).unsqueeze(1)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1).reshape(len(x), -1)
            x += ops.linear(mixed.contiguous(), layer.self_out)
            q = ops.linear(_norm(x, layer.cross_norm), layer.cross_q).view(len(x), shape.decoder_heads, -1)
            keys, values = (part.to(q.dtype) for part in self.cross.read(number, slot))     # [frames, heads, dim]
            for wanted in (head for at, head in heads if at == number):
                scores = q[:, wanted].float() @ keys[:frames, wanted].float().t() * shape.head_dim ** -0.5
                found.append(torch.softmax(scores, dim=-1))
            mixed = F.scaled_dot_product_attention(
                q.transpose(0, 1), keys.transpose(0, 1), values.transpose(0, 1)).transpose(0, 1).reshape(len(x), -1)
            x += ops.linear(mixed.contiguous(), layer.cross_out)
            x += ops.linear(F.gelu(ops.linear(_norm(x, layer.mlp_norm), layer.up)), layer.down)
        return torch.stack(found)


class _Getter:
    """Takes tensors of a Whisper checkpoint by the names inside of `model.`."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def __call__(self, name: str, *shape: int, own: bool = False) -> torch.Tensor:
        return self._weights.get(name if own else "model." + name, shape)

    def affine(self, name: str, width: int) -> Affine:
        return self(name + ".weight", width), self(name + ".bias", width)

    def linear(self, name: str, rows: int, columns: int) -> Affine:
        return self(name + ".weight", rows, columns), self(name + ".bias", rows)

    def qkv(self, at: str, width: int, which: str) -> Affine:
        """The wanted projections below one another; keys have no bias."""
        weight = torch.cat([self(f"{at}{kind}_proj.weight", width, width) for kind in which])
        bias = torch.cat([torch.zeros(width, dtype=weight.dtype) if kind == "k" else self(f"{at}{kind}_proj.bias", width)
                          for kind in which])
        return weight, bias


def _norm(x: torch.Tensor, norm: Affine) -> torch.Tensor:
    return F.layer_norm(x, x.shape[-1:], norm[0], norm[1], EPS)
