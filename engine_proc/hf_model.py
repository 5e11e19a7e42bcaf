"""Any other causal attention model, through transformers' own modeling code with our paged attention registered.

The packed batch goes in as one row with its position ids and no cache; each attention layer calls back here, where keys
and values go to the paged cache and the query attends by block tables. Same scheduler, cache and sampler as the own
decoder. What the model keeps per layer is found by a probe, and a check against transformers' plain forward refuses
models that compute something else this way. Engine process; the only file of it that imports transformers.
"""
from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_proc.attention import AttentionBatch, AttentionSpec, PagedAttention
from engine_proc.checkpoint import refuse
from engine_proc.decoder import ModelBatch
from engine_proc.device import Device
from pipeline.config import ModelConfig
from pipeline.errors import StartError

PROBE_TOKENS = 21
PROBE_CHUNKS = (9, 1, 11)
CLOSE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.25}     # mean difference of log-probabilities
LAYER_TYPES = {"full_attention", "sliding_attention"}


class Unpaged(Exception):
    """The model asks for attention that the paged cache does not have; the text says what."""


class HfModel:
    """A transformers model whose attention reads and writes our cache. One forward at a time."""

    def __init__(self, directory: Path, dtype: torch.dtype, trust_remote_code: bool, device: Device) -> None:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        from transformers import AttentionInterface, AutoModelForCausalLM

        self._name = f"quartet_paged_{id(self):x}"
        AttentionInterface.register(self._name, self._attention)
        try:
            self.net = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, trust_remote_code=trust_remote_code, local_files_only=True,
                use_safetensors=True, attn_implementation=self._name).eval().to(device.torch_device)
        except KeyError as error:
            if self._name not in str(error):
                raise
            raise Unpaged("its modeling code has no attention interface") from None
        if not self.net.is_backend_compatible():
            raise Unpaged("its modeling code has no attention interface")
        self.text_config = self.net.config.get_text_config()
        types = getattr(self.text_config, "layer_types", None) or []
        if not set(types) <= LAYER_TYPES:
            raise Unpaged(f"it has layers of type '{sorted(set(types) - LAYER_TYPES)[0]}'")
        self._types = list(types)
        self._batch: AttentionBatch | None = None
        self._cache: PagedAttention | None = None
        self._seen: dict[int, tuple[int, int]] = {}     # while probing: layer -> (kv heads, head dim)
        self._keeps = "logits_to_keep" in inspect.signature(self.net.forward).parameters
        self.device = device
        self.vocab_size, self.hidden_size = 0, int(self.text_config.hidden_size)

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        """Logits of the wanted rows, [R, vocab]; `logits` has nothing left to do."""
        self._batch, self._cache = batch.attention, cache
        try:
            keep = {"logits_to_keep": batch.rows} if self._keeps else {}
            out = self.net(**self._input(batch), position_ids=batch.positions[None], use_cache=False, **keep).logits[0]
        finally:
            self._batch = self._cache = None
        return out if self._keeps else out[batch.rows]

    def _input(self, batch: ModelBatch) -> dict[str, torch.Tensor]:
        """Ids, or embeddings where some of them are given."""
        if batch.embeds is None:
            return {"input_ids": batch.ids[None]}
        x = self.net.get_input_embeddings()(batch.ids.clamp_min(0))
        return {"inputs_embeds": torch.where(batch.ids[:, None] < 0, batch.embeds.to(x.dtype), x)[None]}

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """float32, of memory of its own."""
        return hidden.to(torch.float32, copy=True)

    def _attention(self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                   attention_mask: torch.Tensor | None, scaling: float | None = None, dropout: float = 0.0,
                   sliding_window: int | None = None, softcap: float | None = None,
                   **kwargs: Any) -> tuple[torch.Tensor, None]:
        """transformers' attention interface: [1, heads, T, head_dim] each -> [1, T, heads, head_dim]."""
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise Unpaged("its attention layers are not numbered")
        if self._batch is None or self._cache is None:
            return self._probe_attention(layer, module, query, key, value, attention_mask, kwargs), None
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        self._cache.write(layer, k, v, self._batch.slots)
        if sliding_window is None and layer < len(self._types) and self._types[layer] == "sliding_attention":
            sliding_window = getattr(self.text_config, "sliding_window", None)
        spec = AttentionSpec(scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
                             window=sliding_window or None, softcap=softcap)
        out = self._cache.attend(layer, q, self._batch, spec)
        return out.view(1, *q.shape), None

    def _probe_attention(self, layer: int, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
                         mask: torch.Tensor | None, kwargs: dict[str, Any]) -> torch.Tensor:
        """Without a batch: note the shapes, refuse what the cache cannot hold. The values do not matter."""
        if key.shape != value.shape or key.shape[-1] != query.shape[-1]:
            raise Unpaged("its keys and values have different shapes (latent attention)")
        if mask is not None:
            raise Unpaged("it adds a mask or position bias of its own to the attention scores")
        if kwargs.get("s_aux") is not None or kwargs.get("sinks") is not None:
            raise Unpaged("it has attention sinks")
        if getattr(module, "is_causal", True) is False or kwargs.get("is_causal") is False:
            raise Unpaged("its attention is not causal")
        self._seen[layer] = key.shape[1], key.shape[3]
        return query.transpose(1, 2)

    def probe(self) -> dict[str, int]:
        """The shape of the cache that the model needs: layers, kv_heads, head_dim. Unpaged where there is none."""
        ids = torch.arange(1, 4, device=self.device.torch_device)[None]
        with torch.inference_mode():
            self.vocab_size = self.net(input_ids=ids, position_ids=ids - 1, use_cache=False).logits.shape[-1]
        if not self._seen or set(self._seen) != set(range(len(self._seen))):
            raise Unpaged("not all of its layers are attention layers")
        if len(self._seen) != self.text_config.num_hidden_layers:
            raise Unpaged("not all of its layers are attention layers")
        if len(set(self._seen.values())) != 1:
            raise Unpaged("its layers have caches of different shapes")
        kv_heads, head_dim = self._seen[0]
        return {"layers": len(self._seen), "kv_heads": kv_heads, "head_dim": head_dim}

    def verify(self, shape: dict[str, int], dtype: torch.dtype) -> None:
        """Compare a prompt computed in chunks through a small paged cache with transformers' own forward."""
        ids = (torch.arange(PROBE_TOKENS, device=self.device.torch_device) * 7 + 3) % self.vocab_size
        with torch.inference_mode():
            self.net.set_attn_implementation("eager")
            expected = torch.log_softmax(self.net(input_ids=ids[None], use_cache=False).logits[0].float(), dim=-1)
            self.net.set_attn_implementation(self._name)
            cache = PagedAttention(num_blocks=PROBE_TOKENS + 1, block_size=1, dtype=dtype,
                                   device=self.device.torch_device, **shape)
            parts, start = [], 0
            for count in PROBE_CHUNKS:
                parts.append(self.forward(self._chunk(ids, start, count), cache).float().flip(0))
                start += count
        difference = (torch.log_softmax(torch.cat(parts), dim=-1) - expected).abs()
        likely = expected > expected.amax(dim=-1, keepdim=True) - 10.0      # the tail says little in half precision
        if not float(difference[likely].mean()) < CLOSE[dtype]:
            raise Unpaged("it computes something else with a paged cache than without")

    def _chunk(self, ids: torch.Tensor, start: int, count: int) -> ModelBatch:
        """A piece of one sequence whose rows are wanted in reverse, to see that the model picks the rows it is told."""
        end = start + count
        tensor = self.device.tensor
        positions = np.arange(start, end)
        starts, lengths = np.array([0, count], np.int32), np.array([end], np.int32)
        return ModelBatch(
            ids=ids[start:end], positions=tensor(positions), rows=tensor(np.arange(count)[::-1].copy()),
            attention=AttentionBatch(
                query_start=tensor(starts), context_len=tensor(lengths), slots=tensor(positions + 1),
                block_tables=tensor(np.arange(1, end + 1, dtype=np.int32)[None]), num_decodes=int(count == 1),
                host_query_start=starts, host_context_len=lengths))


def load_hf_model(directory: Path, dtype: torch.dtype, model: ModelConfig, device: Device,
                  progress: Callable[[int], None]) -> tuple[HfModel, dict[str, int]]:
    """The model and the shape of its cache. StartError where transformers or the paged cache cannot run it."""
    progress(10)
    try:
        net = HfModel(directory, dtype, model.trust_remote_code, device)
        progress(60)
        shape = net.probe()
        net.verify(shape, dtype)
    except Unpaged as unpaged:
        raise refuse(f"The model in {directory} cannot be served: {unpaged}.") from None
    except (StartError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:      # modeling code of any kind, theirs or the checkpoint's
        text = (str(error).strip() or "no message").splitlines()[0][:200].rstrip(". ")
        raise refuse(f"transformers cannot load the model in {directory} ({type(error).__name__}: {text}).") from None
    progress(80)
    return net, shape
