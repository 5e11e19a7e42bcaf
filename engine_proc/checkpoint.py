"""Reads and checks the files of a Hugging Face directory: config.json, the safetensors headers, the sharded index.

Run by `engine_proc.prepare` and by the loader, without torch: a truncated file, a missing shard or broken JSON becomes
one StartError sentence before anything is mapped. Never reads pickle weights.
"""
from __future__ import annotations

import json
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD

MAX_JSON_BYTES = 64 * 2**20
MAX_HEADER_BYTES = 100 * 2**20      # the limit of the safetensors format itself
INDEX = "model.safetensors.index.json"


def refuse(sentence: str) -> StartError:
    """The error of a checkpoint that cannot be used: one sentence, exit code 3."""
    return StartError(MODEL_LOAD, sentence)


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is; `dtype` is the safetensors name (BF16, F16, F32 ...)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; StartError when it is missing, too large, malformed or no object."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise refuse(f"The file {path} is too large to be a configuration.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise refuse(f"The file {path} cannot be read: {error.strerror or 'no such file'}.") from None
    except (ValueError, RecursionError):
        raise refuse(f"The file {path} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise refuse(f"The file {path} is not a JSON object.")
    return value


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name; StartError when header and file do not agree."""
    try:
        size = os.stat(file).st_size
        with open(file, "rb") as stream:
            prefix = stream.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if length > min(size - 8, MAX_HEADER_BYTES):
                raise refuse(f"The weights file {file} is truncated or not a safetensors file.")
            header = json.loads(stream.read(length))
    except OSError as error:
        raise refuse(f"The weights file {file} cannot be read: {error.strerror or 'no such file'}.") from None
    except (ValueError, RecursionError):
        raise refuse(f"The weights file {file} has a broken header.") from None
    try:
        tensors = {
            name: TensorInfo(file=file, dtype=str(entry["dtype"]), shape=tuple(int(n) for n in entry["shape"]),
                             nbytes=int(entry["data_offsets"][1]) - int(entry["data_offsets"][0]))
            for name, entry in header.items() if name != "__metadata__"}
        end = max((int(e["data_offsets"][1]) for n, e in header.items() if n != "__metadata__"), default=0)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError):
        raise refuse(f"The weights file {file} has a broken header.") from None
    if 8 + length + end > size:
        raise refuse(f"The weights file {file} is truncated: it should hold {8 + length + end} bytes and has {size}.")
    return tensors


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those of the index, or the single file, or all that there are."""
    index = directory / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise refuse(f"The file {index} has no weight map.")
        names = sorted({str(name) for name in weight_map.values()})
        if any(os.path.basename(name) != name for name in names):
            raise refuse(f"The file {index} points outside its directory.")
        missing = [name for name in names if not (directory / name).exists()]
        if missing:
            raise refuse(f"The checkpoint {directory} lacks the weights file '{missing[0]}'.")
        return [directory / name for name in names]
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        pickled = any(directory.glob("*.bin")) or any(directory.glob("*.pt")) or any(directory.glob("*.pth"))
        hint = "; pickle weights (.bin, .pt) are not loaded, convert them to safetensors" if pickled else ""
        raise refuse(f"The directory {directory} has no safetensors weights{hint}.")
    return files


def tensor_table(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint by name, over all of its shards."""
    table: dict[str, TensorInfo] = {}
    for file in weight_files(directory):
        table.update(read_header(file))
    if not table:
        raise refuse(f"The weights of {directory} hold no tensors.")
    return table


def check(directory: Path) -> dict[str, Any]:
    """Check that a directory is a loadable checkpoint as far as its headers tell, and return its configuration."""
    if not directory.is_dir():
        raise refuse(f"There is no model directory {directory}.")
    config = read_json(directory / "config.json")
    if not isinstance(config.get("model_type"), str):
        raise refuse(f"The file {directory / 'config.json'} names no model_type.")
    tensor_table(directory)
    return config
