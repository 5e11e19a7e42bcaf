"""Reads tensors of a checkpoint into memory of our own: mapped, converted, fused; nothing is initialised first.

Used by the engine's loader. Every tensor is copied once, so that a file that is replaced or cut while the server runs
cannot crash it. Remembers what was taken: a tensor that nobody asked for means that the description does not fit.
"""
from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from engine_proc.checkpoint import refuse, tensor_table
from engine_proc.parallel.share import Piece

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
# Buffers that some files carry and that follow from the configuration.
IGNORED = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")


class Weights:
    """The tensors of one checkpoint directory, by name."""

    def __init__(self, directory: Path, dtype: torch.dtype | None = None) -> None:
        """`dtype`: what tensors are converted to; None: that of the embedding, or most of the bytes (see `native`)."""
        self.table = tensor_table(directory)
        self.directory = directory
        self.dtype = dtype or self.native()
        self._files: dict[Path, safe_open] = {}
        self._taken: set[str] = set()
        self.base = ""                  # what the names of the decoder's own tensors begin with

    def native(self) -> torch.dtype:
        """The dtype that holds most of the checkpoint's bytes; StartError for integers and 8-bit floats."""
        sizes: dict[str, int] = {}
        for info in self.table.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
        name = max(sizes, key=lambda key: sizes[key])
        if name not in FLOATS:
            raise refuse(f"The weights of {self.directory} are stored as {name}, which this server does not load.")
        return FLOATS[name]

    def __contains__(self, name: str) -> bool:
        return name in self.table

    def find(self, ending: str, shape: tuple[int, ...]) -> str | None:
        """The name of the one tensor that ends so and has this shape; StartError when several do."""
        found = [name for name, info in self.table.items()
                 if (name == ending or name.endswith("." + ending)) and info.shape == shape]
        if len(found) > 1:
            raise refuse(f"The checkpoint {self.directory} has several tensors '{ending}'.")
        return found[0] if found else None

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """A tensor of its own, contiguous, of the given shape; StartError when it is missing or of another shape."""
        return self.stack([name], [shape], dtype)

    def stack(self, names: list[str], shapes: list[tuple[int, ...]], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Several tensors below one another (dimension 0), which is what a fused linear layer needs."""
        return self.assemble([Piece(name, shape, (0, shape[0])) for name, shape in zip(names, shapes, strict=True)], dtype)

    def assemble(self, pieces: list[Piece], dtype: torch.dtype | None = None) -> torch.Tensor:
        """Parts of tensors below one another; nothing else of them is read."""
        total = sum(last - first for first, last in (piece.rows for piece in pieces))
        columns = pieces[0].columns
        rest = pieces[0].shape[1:] if columns is None else (columns[1] - columns[0],)
        out = torch.empty((total, *rest), dtype=dtype or self.dtype)
        row = 0
        for piece in pieces:
            (first, last), whole = piece.rows, self._mapped(piece.name, piece.shape)
            part = whole[first:last]
            out[row:row + last - first].copy_(part if piece.columns is None else part[:, slice(*piece.columns)])
            row += last - first
        return out

    def _mapped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        info = self.table.get(name)
        if info is None:
            raise refuse(f"The checkpoint {self.directory} lacks the tensor '{name}'.")
        if info.shape != shape:
            raise refuse(f"The tensor '{name}' of {self.directory} has the shape {list(info.shape)}, "
                         f"and the configuration says {list(shape)}.")
        if info.dtype not in FLOATS:
            raise refuse(f"The tensor '{name}' of {self.directory} is stored as {info.dtype}, which is not loaded.")
        if info.file not in self._files:
            self._files[info.file] = safe_open(info.file, framework="pt")
        self._taken.add(name)
        return self._files[info.file].get_tensor(name)

    def ignore(self, name: str) -> None:
        """Nobody needs this tensor."""
        self._taken.add(name)

    def left_over(self) -> list[str]:
        """Tensors that nobody took and that matter; the towers of a multimodal model do not."""
        nested = self.base not in ("", "model.")
        return sorted(name for name in self.table if name not in self._taken and not name.endswith(IGNORED)
                      and (not nested or name.startswith(self.base) or "lm_head" in name))

    def close(self) -> None:
        """Unmap the files."""
        self._files.clear()
