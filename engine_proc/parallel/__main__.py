"""`python -m engine_proc.parallel STORE RANK SIZE FD PARENT`: one rank of a model, started by its engine process.

Loads its share of the weights, then does what rank 0 tells it over the socket FD, until that is closed. It answers
nothing: its part of each result travels in the collectives. Holds no requests and opens no socket of its own.
"""
from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from engine_proc.attention import PagedAttention
from engine_proc.decoder import Decoder
from engine_proc.device import Device
from engine_proc.parallel import frames
from engine_proc.parallel.share import Share
from engine_proc.parallel.start import cache_shape, load_rank
from pipeline.config import ModelConfig, build
from pipeline.errors import StartError
from pipeline.exits import MEMORY
from pipeline.parent import die_with


@torch.inference_mode()
def serve(sock: socket.socket, net: Decoder, cache: PagedAttention, device: Device) -> None:
    """Take steps until rank 0 is gone."""
    hidden = torch.empty(0)
    while True:
        what, *rest = frames.receive(sock)
        if what == frames.STEP:
            hidden = net.forward(frames.batch_of(rest, device), cache)
        elif what == frames.LOGITS:
            first, count = rest
            net.logits(hidden[first:first + count])
        elif what == frames.COPY:
            cache.copy_blocks([(source, target) for source, target in rest[0]])
        else:
            raise AssertionError(f"a record of type {what}")


def start(sock: socket.socket, share: Share, store: Path) -> None:
    model: ModelConfig = build(ModelConfig, frames.receive(sock)[0])
    try:
        frames.send(sock, frames.HERE)
        net, shape, dtype, device = load_rank(model, share, store)
        gc.collect()
        frames.send(sock, frames.LOADED, device.available_bytes())
        what, num_blocks = frames.receive(sock)
        assert what == frames.CACHE
        cache = PagedAttention(**cache_shape(shape, share, num_blocks, model.engine.block_size, dtype, device))
    except (StartError, MemoryError, torch.OutOfMemoryError) as error:
        code, sentence = (error.exit_code, error.message) if isinstance(error, StartError) else (
            MEMORY, f"There is not enough memory to load {model.path}.")
        frames.send(sock, frames.FAILED, code, sentence)
        frames.receive(sock)            # rank 0 says why it ends, and we with it
        return
    gc.freeze()
    serve(sock, net, cache, device)


def main() -> None:
    store, rank, size, descriptor, parent = sys.argv[1], *map(int, sys.argv[2:])
    die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=descriptor) as sock:
        try:
            start(sock, Share(rank, size), Path(store))
        except frames.Gone:             # rank 0 has ended, or ends
            sys.stderr.flush()
            os._exit(0)                 # at once: a destructor could wait for it in a collective


if __name__ == "__main__":
    main()
