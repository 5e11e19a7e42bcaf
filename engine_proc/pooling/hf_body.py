"""Any other model as a body, through transformers' own modeling code, with batches padded on the right.

Engine process. Gives the last hidden states (`AutoModel`), or the class scores of a model whose classifier has no row
in our table. Must never run code of a checkpoint unless it is trusted.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine_proc.checkpoint import refuse
from engine_proc.pooling.body import Packed
from pipeline.errors import StartError


class HfBody:
    """Implements `body.Body`. `kind`: hidden | sequence | token (class scores of inputs, of tokens)."""

    padded = True

    def __init__(self, directory: Path, dtype: torch.dtype, kind: str, trust_remote_code: bool) -> None:
        self._net = _load(directory, dtype, kind, trust_remote_code)
        config = self._net.config.get_text_config()
        if config.is_encoder_decoder:
            raise refuse(f"The model {directory} is an encoder-decoder, which this server does not pool.")
        self._kind, self.config = kind, config
        self._pad = config.pad_token_id if config.pad_token_id is not None else 0
        if kind == "sequence" and getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = self._net.config.pad_token_id = 0
        self.width = int(self._net.config.num_labels if kind != "hidden" else config.hidden_size)
        self.vocab_size = int(config.vocab_size)
        types = int(getattr(config, "type_vocab_size", 0) or 0)
        self.num_type_ids = max(1, types)
        self.max_positions = 0
        self._check(directory)

    def _check(self, directory: Path) -> None:
        """Padding must change nothing: a causal or bidirectional model that honours its mask."""
        one = Packed(ids=np.array([3, 4, 5]) % self.vocab_size, type_ids=np.zeros(3, np.int64),
                     starts=np.array([0, 3], np.int32))
        two = Packed(ids=np.array([3, 4, 5, 6, 7, 8, 9, 10]) % self.vocab_size, type_ids=np.zeros(8, np.int64),
                     starts=np.array([0, 3, 8], np.int32))
        alone, beside = self.forward(one), self.forward(two)[:len(self.forward(one))]
        if not torch.isfinite(alone).all() or float((alone - beside).abs().max()) > 0.05 * float(alone.abs().max()):
            raise refuse(f"The model {directory} computes something else beside a longer text than alone.")

    @torch.inference_mode()
    def forward(self, packed: Packed) -> torch.Tensor:
        lengths = packed.lengths
        shape = (len(lengths), int(lengths.max()))
        mask = np.arange(shape[1])[None, :] < lengths[:, None]
        ids = np.full(shape, self._pad, np.int64)
        ids[mask] = packed.ids
        given: dict[str, Any] = {"input_ids": torch.from_numpy(ids),
                                 "attention_mask": torch.from_numpy(mask.astype(np.int64))}
        if self.num_type_ids > 1:
            types = np.zeros(shape, np.int64)
            types[mask] = packed.type_ids
            given["token_type_ids"] = torch.from_numpy(types)
        out = self._net(**given)
        if self._kind == "sequence":
            return out.logits.float()
        rows = out.last_hidden_state if self._kind == "hidden" else out.logits
        return rows[torch.from_numpy(mask)].float()


def _load(directory: Path, dtype: torch.dtype, kind: str, trust_remote_code: bool) -> Any:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    import transformers

    auto = {"hidden": transformers.AutoModel, "sequence": transformers.AutoModelForSequenceClassification,
            "token": transformers.AutoModelForTokenClassification}[kind]
    try:
        return auto.from_pretrained(directory, dtype=dtype, trust_remote_code=trust_remote_code,
                                    local_files_only=True, use_safetensors=True).eval()
    except (StartError, MemoryError):
        raise
    except Exception as error:      # modeling code of any kind, theirs or the checkpoint's
        text = (str(error).strip() or "no message").splitlines()[0][:200].rstrip(". ")
        raise refuse(f"transformers cannot load the model in {directory} ({type(error).__name__}: {text}).") from None
