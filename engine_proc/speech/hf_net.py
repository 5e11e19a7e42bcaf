"""Any sequence-to-sequence speech model of transformers that takes samples (Moonshine), behind our own interface.

Engine process. Encoder and decoder are the library's, one sequence at a time, each with a cache of the library's own in
its window's slot: breadth, not speed. A sequence that starts from its first token again gets a fresh cache.
"""
from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from engine_proc.checkpoint import refuse
from engine_proc.device import Device, available_cores
from engine_proc.speech.net import SpeechBatch
from engine_proc.speech.runner import SpeechRunner
from engine_proc.speech.sampling import torch_argmax
from engine_proc.speech.vocabulary import Vocabulary, read_tokenizer
from pipeline.config import ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG

if TYPE_CHECKING:
    from transformers import EncoderDecoderCache

LEAST_SAMPLES = 4096                # a shorter sound has no frame after the encoder's strides
LONGEST = 448


class HfSpeech:
    """Implements net.SpeechNet."""

    def __init__(self, model: Any, slots: int) -> None:
        self._model, self._encoder, self._decoder = model, model.get_encoder(), model.get_decoder()
        self._head = model.get_output_embeddings()
        self.num_lanes = 1
        self.vocab_size = int(model.config.vocab_size)
        self._states: list[torch.Tensor | None] = [None] * slots
        self._caches: list[EncoderDecoderCache | None] = [None] * slots

    def encode(self, slots: list[int], inputs: list[np.ndarray]) -> None:
        """`inputs`: samples, float32 [n] each."""
        for slot, samples in zip(slots, inputs, strict=True):
            padded = np.pad(samples, (0, max(0, LEAST_SAMPLES - len(samples))))
            given = torch.from_numpy(padded)[None].to(self._model.dtype)
            self._states[slot], self._caches[slot] = self._encoder(given).last_hidden_state, None

    def forward(self, batch: SpeechBatch) -> torch.Tensor:
        from transformers import DynamicCache, EncoderDecoderCache
        model, rows = batch.model, []
        starts = model.attention.host_query_start
        for s, slot in enumerate(batch.slots.tolist()):
            first, end = int(starts[s]), int(starts[s + 1])
            cache = self._caches[slot]
            if cache is None or int(model.positions[first]) == 0:
                cache = self._caches[slot] = EncoderDecoderCache(DynamicCache(), DynamicCache())
            assert cache.get_seq_length() == int(model.positions[first])
            rows.append(self._decoder(
                input_ids=model.ids[None, first:end], encoder_hidden_states=self._states[slot], past_key_values=cache,
                use_cache=True).last_hidden_state[0])
        return torch.cat(rows)[model.rows]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(hidden).float()

    def argmax(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch_argmax(logits)

    def attention_weights(self, slot: int, ids: list[int], heads: list[tuple[int, int]], frames: int) -> torch.Tensor:
        raise AssertionError("a model without alignment heads is never asked for word times")


def load_hf_speech(model: ModelConfig, config: dict[str, Any], dtype: torch.dtype, device: Device) -> SpeechRunner:
    """StartError for a model that transformers does not know as one that turns speech into text."""
    directory, engine = Path(model.path), model.engine
    if engine.quantization is not None:
        raise StartError(CONFIG, f"--quantization {engine.quantization} works with Whisper only, not with "
                                 f"'{config['model_type']}'.")
    if model.trust_remote_code:
        raise refuse("Speech models with code of their own are not run.")
    torch.set_num_threads(engine.threads or available_cores())
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    from transformers import AutoModelForSpeechSeq2Seq
    try:
        net = AutoModelForSpeechSeq2Seq.from_pretrained(directory, dtype=dtype, use_safetensors=True,
                                                        local_files_only=True).eval()
    except (ValueError, OSError, KeyError) as error:
        raise refuse(f"transformers cannot load {directory} as a speech model: {str(error)[:200]}.") from None
    if net.main_input_name != "input_values":
        raise refuse(f"Models of type '{config['model_type']}' take features that this server does not compute.")
    settings = net.generation_config
    start, end = settings.decoder_start_token_id, settings.eos_token_id
    start = net.config.decoder_start_token_id if start is None else start
    end = end[0] if isinstance(end, list) else net.config.eos_token_id if end is None else end
    if start is None or end is None:
        raise refuse(f"The checkpoint {directory} does not say where a transcript starts and ends.")
    vocabulary = Vocabulary(
        tokenizer=read_tokenizer(directory), eot=int(end), sot=int(start), first_special=int(net.config.vocab_size),
        suppress=tuple(settings.suppress_tokens or ()), begin_suppress=tuple(settings.begin_suppress_tokens or ()), lead=" ",
        max_length=min(LONGEST, int(getattr(net.config, "max_position_embeddings", LONGEST))))
    slots = engine.max_num_seqs
    facts = {"dtype": str(dtype).removeprefix("torch."), "device": device.name, "backend": "transformers",
             "architecture": config["model_type"], "arithmetic": "torch", "window_s": 30.0, "input": "samples",
             "windows": slots, "languages": [], "translates": False, "timestamps": False, "words": False, "prompts": False}
    blocks = slots * -(-vocabulary.max_length // engine.block_size) + 1
    return SpeechRunner(HfSpeech(net, slots), vocabulary, device, engine, blocks, slots, 0.0, facts)
