"""Rank 0's side: starts the other ranks, tells them each step, and ends with any of them.

A model that is split is whole only while every rank lives, so the death of one ends the engine process at once
(`os._exit`, from whichever thread learns of it first): its launcher starts the next epoch, and requests are submitted
again. The other way round the ranks end with us: by PR_SET_PDEATHSIG and by the end of their socket. Engine process.
"""
from __future__ import annotations

import atexit
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from engine_proc.attention import PagedAttention
from engine_proc.decoder import Decoder, ModelBatch
from engine_proc.device import Device
from engine_proc.parallel import frames, team
from engine_proc.parallel.share import Share
from pipeline.config import ModelConfig, to_json
from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD

EXIT_CODE = 1                   # not one of pipeline.exits: the launcher starts the engine again
log = logging.getLogger(__name__)


def end(sentence: str) -> NoReturn:
    """The last words of an engine that has lost a rank. Nothing is cleaned up: a collective may be under way."""
    print(sentence, file=sys.stderr, flush=True)
    os._exit(EXIT_CODE)


class Ranks:
    """Ranks 1, 2 ... of one model. `run_dir`: where the file lies through which they meet; None: a fresh directory."""

    def __init__(self, model: ModelConfig, run_dir: Path | None, die: Callable[[str], Any] = end) -> None:
        self.size = model.engine.tensor_parallel
        self._die, self._closing = die, False
        self._directory = Path(tempfile.mkdtemp(prefix="ranks.", dir=run_dir))
        self.store = self._directory / "store"
        self._sockets: list[socket.socket] = []
        self._children: list[subprocess.Popen[bytes]] = []
        for rank in range(1, self.size):
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", "engine_proc.parallel", str(self.store), str(rank), str(self.size),
                           str(theirs.fileno()), str(os.getpid())]
                self._children.append(subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()]))
            self._sockets.append(ours)
            threading.Thread(target=self._watch, args=(rank, self._children[-1]), daemon=True).start()
        atexit.register(self.close)
        for ours in self._sockets:
            frames.send(ours, json.loads(to_json(model)))

    def _watch(self, rank: int, child: subprocess.Popen[bytes]) -> None:
        """A thread for each rank: wait for its end."""
        code = child.wait()
        if not self._closing:
            how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
            self._die(f"Rank {rank} of the model ended {how}, and the engine ends with it.")

    def join(self, device: Device) -> team.Team:
        """Meet them, once all are there."""
        for rank, ours in enumerate(self._sockets, 1):
            self._expect(rank, ours, frames.HERE)
        return team.join(Share(0, self.size), self.store, device.torch_device)

    def loaded(self) -> list[int]:
        """Wait until every rank has its weights; the bytes that each could still take."""
        return [self._expect(rank, ours, frames.LOADED)[0] for rank, ours in enumerate(self._sockets, 1)]

    def _expect(self, rank: int, ours: socket.socket, what: str) -> list[Any]:
        try:
            got, *rest = frames.receive(ours)
        except frames.Gone:
            raise StartError(MODEL_LOAD, f"Rank {rank} of the model ended while it started.") from None
        if got == frames.FAILED:
            raise StartError(*rest)
        assert got == what, (got, what)
        return rest

    def tell(self, *record: Any) -> None:
        """Send a record to all ranks. They take them in order; nothing is answered."""
        body = frames.pack(*record)
        for ours in self._sockets:
            ours.sendall(body)

    def lost(self, error: Exception) -> NoReturn:
        """A step broke off here: the ranks stand in different places, and none of them can go on."""
        log.error("a step broke off in rank 0", exc_info=error)
        self._die(f"The ranks of the model lost one another ({type(error).__name__}: {error}), and the engine ends.")
        raise error

    def close(self) -> None:
        """End the ranks and wait for them. Run at exit too, so that their end is not taken for a death."""
        self._closing = True
        atexit.unregister(self.close)
        for ours in self._sockets:
            ours.close()
        for child in self._children:
            child.kill()
            child.wait()
        shutil.rmtree(self._directory, ignore_errors=True)


class LeaderModel:
    """Implements runner.Model: rank 0's part of the decoder, each call told to the others first."""

    def __init__(self, net: Decoder, ranks: Ranks) -> None:
        self.vocab_size, self.hidden_size = net.vocab_size, net.hidden_size
        self._net, self._ranks = net, ranks
        self._hidden = torch.empty(0)

    def forward(self, batch: ModelBatch, cache: PagedAttention) -> torch.Tensor:
        try:
            self._ranks.tell(frames.STEP, *frames.step(batch))
            self._hidden = self._net.forward(batch, cache)
        except Exception as error:
            self._ranks.lost(error)
        return self._hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden`: consecutive rows of what `forward` gave, which every rank has."""
        row = self._hidden.stride(0) * self._hidden.element_size()
        first = (hidden.data_ptr() - self._hidden.data_ptr()) // row
        assert 0 <= first and first + len(hidden) <= len(self._hidden)
        try:
            self._ranks.tell(frames.LOGITS, first, len(hidden))
            return self._net.logits(hidden)
        except Exception as error:
            self._ranks.lost(error)

    def close(self) -> None:
        """End the other ranks."""
        self._ranks.close()


class LeaderCache(PagedAttention):
    """Rank 0's heads of the cache. Blocks have the same numbers on every rank."""

    def __init__(self, ranks: Ranks, **shape: Any) -> None:
        super().__init__(**shape)
        self._ranks = ranks

    def copy_blocks(self, pairs: Sequence[tuple[int, int]]) -> None:
        try:
            self._ranks.tell(frames.COPY, [list(pair) for pair in pairs])
        except OSError as error:
            self._ranks.lost(error)
        super().copy_blocks(pairs)
