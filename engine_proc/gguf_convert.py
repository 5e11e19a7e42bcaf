"""Turns a GGUF file into a Hugging Face directory in bfloat16, through transformers' own GGUF loader.

Run by `engine_proc.prepare` only, in its short-lived process. Writes model.safetensors, config.json,
generation_config.json, tokenizer.json and tokenizer_config.json (with the chat template). What the loader leaves out
and generation needs is completed here: every end-of-turn token, rope scaling, the digit split of some tokenizers.
"""
from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Progress = Callable[[str, int], None]

# Tokens that end a turn: one of these counts as an end of the answer when the chat template writes it.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>", "</s>",
             "<|eom_id|>", "<|END_OF_TURN_TOKEN|>", "<|end_of_role|>")
# `tokenizer.ggml.pre` values whose tokenizers split off each digit ahead of the byte-level split.
DIGIT_SPLITTERS = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})


def convert(source: Path, out: Path, progress: Progress) -> None:
    """Write the directory `out` (which exists and is empty) from the GGUF file `source`.

    Whatever transformers cannot read raises its own exception; the caller turns it into one sentence.
    """
    progress("importing transformers", 0)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    progress("reading GGUF", 20)
    folder, name = str(source.parent), source.name
    with _fast_reading() as read:
        facts = read(str(source))
        progress("dequantising", 30)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.bfloat16,
            quantization_config=GgufConfig(gguf_file=name, dequantize=True))
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.hf_quantizer = None  # type: ignore[assignment]
        progress("converting the tokenizer", 75)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
    progress("writing", 85)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _complete_config(out, facts)
    _complete_tokenizer(out, facts, tokenizer)
    progress("writing", 100)


@contextlib.contextmanager
def _fast_reading() -> Iterator[Callable[[str], Any]]:
    """Make gguf's reader usable for vocabularies: one read per file, plain arrays in place of memmap slices.

    The loader reads the file three times and looks the tensor names up once per module, which costs 20 s for a
    vocabulary of 49,152. Both are pure functions of the file, which does not change meanwhile.
    """
    import gguf

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, value: Any) -> None:
            self._bytes = np.asarray(value).view(np.ndarray)    # memmap's own slicing is five times slower

    read = functools.cache(Reader)
    saved = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader = read  # type: ignore[misc, assignment]
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    try:
        yield read
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = saved  # type: ignore[misc]


def _field(facts: Any, key: str, default: Any = None) -> Any:
    field = facts.get_field(key)
    return default if field is None else field.contents()


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    change(value)
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _rope_scaling(facts: Any, context: int) -> dict[str, Any] | None:
    """Rope scaling as transformers spells it; the loader drops it. None when the file scales nothing."""
    arch = _field(facts, "general.architecture")
    freqs = next((tensor for tensor in facts.tensors if tensor.name == "rope_freqs.weight"), None)
    if freqs is not None and arch == "llama":
        # Llama 3.1 and later: the factors are those of rope type "llama3", whose largest is the factor itself.
        return {"rope_type": "llama3", "factor": float(np.max(freqs.data)), "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    kind = _field(facts, f"{arch}.rope.scaling.type")
    factor = _field(facts, f"{arch}.rope.scaling.factor")
    if kind in ("linear", "yarn") and factor:
        scaling = {"rope_type": kind, "factor": float(factor)}
        if kind == "yarn":
            original = _field(facts, f"{arch}.rope.scaling.original_context_length", int(context / factor))
            scaling["original_max_position_embeddings"] = int(original)
        return scaling
    return None


def _complete_config(out: Path, facts: Any) -> None:
    def change(config: dict[str, Any]) -> None:
        config.pop("_model_name_or_path", None)
        scaling = _rope_scaling(facts, config.get("max_position_embeddings", 0))
        rope = config.get("rope_parameters") or {}
        if scaling is not None and rope.get("rope_type", "default") == "default":
            config["rope_parameters"] = {**rope, **scaling}
    _edit(out / "config.json", change)


def _complete_tokenizer(out: Path, facts: Any, tokenizer: Any) -> None:
    template = tokenizer.chat_template or _field(facts, "tokenizer.chat_template") or ""
    ends = [_field(facts, "tokenizer.ggml.eos_token_id"), _field(facts, "tokenizer.ggml.eot_token_id")]
    tokens = {token.content: id_ for id_, token in tokenizer.added_tokens_decoder.items()}
    ends += [tokens[token] for token in TURN_ENDS if token in tokens and token in template]
    ids = list(dict.fromkeys(int(id_) for id_ in ends if id_ is not None))

    def generation(config: dict[str, Any]) -> None:
        if ids:
            config["eos_token_id"] = ids if len(ids) > 1 else ids[0]
    _edit(out / "generation_config.json", generation)

    def settings(config: dict[str, Any]) -> None:
        config.pop("is_local", None)
        config.pop("local_files_only", None)
        if template:
            config["chat_template"] = template
    _edit(out / "tokenizer_config.json", settings)

    def digits(config: dict[str, Any]) -> None:
        before = config.get("pre_tokenizer")
        if before and before.get("type") == "ByteLevel":
            split = {"type": "Digits", "individual_digits": True}
            config["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, before]}
    if _field(facts, "tokenizer.ggml.pre") in DIGIT_SPLITTERS:
        _edit(out / "tokenizer.json", digits)
