"""A causal decoder as the body of a pooling model: the own decoder over a scratch KV cache, whole inputs at once.

Engine process. The cache holds one batch and is written anew by each; nothing is kept between batches.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from engine_proc.arch import Arch
from engine_proc.attention import AttentionBatch, PagedAttention
from engine_proc.decoder import Decoder, ModelBatch, load_decoder
from engine_proc.device import Device
from engine_proc.layers import Ops
from engine_proc.pooling.body import Packed
from engine_proc.runner import Model
from engine_proc.weights import Weights

HEAD_NAMES = ("score.weight", "classifier.weight", "linear.weight")     # of heads that the pooling loader reads


class DecoderBody:
    """Implements `body.Body`."""

    padded = False
    num_type_ids = 1

    def __init__(self, arch: Arch, weights: Weights, ops: Ops, device: Device, longest: int, budget: int,
                 max_items: int, block_size: int, progress: Callable[[int], None]) -> None:
        """`longest`: tokens of an input; `budget`, `max_items`: of a batch of several."""
        net = load_decoder(arch, weights, ops, longest, progress, head=False)
        self.width, self._device, self._block_size = arch.hidden, device, block_size
        self.vocab_size, self.max_positions = arch.vocab, 0
        num_blocks = -(-max(longest, budget) // block_size) + max_items + 1
        self._cache = PagedAttention(
            layers=len(arch.layers), num_blocks=num_blocks, block_size=block_size, kv_heads=arch.kv_heads,
            head_dim=arch.head_dim, dtype=weights.dtype, device=device.torch_device)
        self._net: Model = net
        if isinstance(net, Decoder) and net.ops.name == "kernels":
            from engine_proc.fused import FusedDecoder
            self._net = FusedDecoder(net, self._cache)

    @torch.inference_mode()
    def forward(self, packed: Packed) -> torch.Tensor:
        return self._net.forward(self._batch(packed), self._cache).float()

    def _batch(self, packed: Packed) -> ModelBatch:
        size, lengths, places = self._block_size, packed.lengths, packed.places
        several = np.flatnonzero(lengths != 1)
        blocks = -(-lengths // size)
        first = np.cumsum(blocks) - blocks + 1                            # block 0 is nobody's
        tables = np.zeros((len(lengths), int(blocks.max())), np.int32)
        for number, count in enumerate(blocks):
            tables[number, :count] = np.arange(first[number], first[number] + count)
        slots = np.repeat(first, lengths) * size + places                 # an input's blocks lie side by side
        tensor, context = self._device.tensor, lengths.astype(np.int32)
        return ModelBatch(
            ids=tensor(packed.ids), positions=tensor(places), rows=tensor(np.arange(len(places))),
            attention=AttentionBatch(
                query_start=tensor(packed.starts), context_len=tensor(context), block_tables=tensor(tables),
                slots=tensor(slots), num_decodes=int(several[0]) if len(several) else len(lengths),
                host_query_start=packed.starts, host_context_len=context))


def token_rows(weights: Weights, arch: Arch, ids: Sequence[int]) -> torch.Tensor:
    """float32 [len(ids), hidden]: the rows of the language model's head for these tokens."""
    shape = (arch.vocab, arch.hidden)
    names = ([] if arch.tied else [weights.find(f"{arch.names['head']}.weight", shape)])
    name = next(filter(None, names), None) or weights.find(f"{arch.names['embed']}.weight", shape)
    assert name is not None
    return weights.get(name, shape)[list(ids)].float()
