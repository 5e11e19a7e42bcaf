"""What the ranks tell one another over a stream socket: msgpack records with their length in front.

Rank 0 sends the steps; the others report how their start went. Both ends are ours and of one version, so records are
plain arrays `[what, ...]`; NumPy arrays travel as [dtype, shape, bytes]. Engine process and its ranks.
"""
from __future__ import annotations

import socket
import struct
from typing import Any

import msgpack
import numpy as np
import torch

from engine_proc.attention import AttentionBatch
from engine_proc.decoder import ModelBatch
from engine_proc.device import Device

# From a rank to rank 0.
HERE, LOADED, FAILED = "here", "loaded", "failed"               # -, available bytes, (exit code, sentence)
# From rank 0.
CACHE, COPY, STEP, LOGITS = "cache", "copy", "step", "logits"   # blocks, pairs, a batch, (first row, rows)
MAX_BYTES = 2**30
LENGTH = struct.Struct("<I")


class Gone(Exception):
    """The other end is closed."""


def send(sock: socket.socket, *record: Any) -> None:
    """Gone when nobody reads there any more."""
    body = pack(*record)
    try:
        sock.sendall(body)
    except OSError as error:
        raise Gone(str(error)) from None


def pack(*record: Any) -> bytes:
    body = msgpack.packb(record)
    assert body is not None and len(body) <= MAX_BYTES
    return LENGTH.pack(len(body)) + body


def receive(sock: socket.socket) -> list[Any]:
    """The next record; Gone at the end of the stream."""
    (length,) = LENGTH.unpack(_exactly(sock, LENGTH.size))
    if length > MAX_BYTES:
        raise Gone(f"a record of {length} bytes")
    record: list[Any] = msgpack.unpackb(_exactly(sock, length), max_bin_len=MAX_BYTES)
    return record


def _exactly(sock: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    view = memoryview(data)
    while view:
        try:
            got = sock.recv_into(view)
        except OSError as error:
            raise Gone(str(error)) from None
        if not got:
            raise Gone("closed")
        view = view[got:]
    return data


def step(batch: ModelBatch) -> list[Any]:
    """The fields of a STEP record: a batch by its arrays on the host."""
    attention = batch.attention
    embeds = None if batch.embeds is None else _array(_host(batch.embeds))
    return [attention.num_decodes, embeds, *(_array(array) for array in (
        attention.host_query_start, attention.host_context_len, *map(_host, (
            attention.block_tables, attention.slots, batch.ids, batch.positions, batch.rows))))]


def batch_of(fields: list[Any], device: Device) -> ModelBatch:
    """The batch of a STEP record's fields."""
    num_decodes, embeds, *arrays = fields
    starts, lengths, *rest = map(_unpacked, arrays)
    tables, slots, ids, positions, rows = (device.tensor(array) for array in rest)
    return ModelBatch(
        ids=ids, positions=positions, rows=rows,
        embeds=None if embeds is None else device.tensor(_unpacked(embeds)),
        attention=AttentionBatch(
            query_start=device.tensor(starts), context_len=device.tensor(lengths), block_tables=tables, slots=slots,
            num_decodes=num_decodes, host_query_start=starts, host_context_len=lengths))


def _host(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _array(array: np.ndarray) -> list[Any]:
    return [array.dtype.str, list(array.shape), array.tobytes()]


def _unpacked(record: list[Any]) -> np.ndarray:
    dtype, shape, data = record
    return np.frombuffer(bytearray(data), dtype).reshape(shape)     # of memory of its own, which torch may write
