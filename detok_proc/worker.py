"""The detokenizer stage: step outputs of the engines in, text deltas to the frontends out.

Owns the table of open choices. Every entry is opened and closed by exactly one record of its engine (or dropped with
it or with its frontend); nothing is evicted, nothing expires. One choice's failure ends that choice only. What a
frontend's outbox does not take waits merged per choice; nothing here ever blocks.
"""
from __future__ import annotations

import logging
import struct
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from detok_proc.choice import Choice, Gap
from detok_proc.vocab import Vocab
from pipeline.config import ServerConfig
from pipeline.errors import StartError
from pipeline.ids import frontend_epoch, frontend_index, short_epoch
from pipeline.messages import (
    TOKEN_ROW,
    Deltas,
    Failed,
    FailedItem,
    Finish,
    Kind,
    Load,
    Open,
    StepOut,
    StopHit,
    TextDelta,
    TokenOut,
)
from pipeline.per_model import PerModel
from pipeline.schema import BadFrame
from pipeline.transport import Address, Sender

RETRY_NS = 5_000_000                # how soon an outbox that was full is tried again
MAX_DELTAS_BYTES = 4 * 2**20        # of one message, about
SILENT = (Finish.ABORT, Finish.ERROR)   # closings that the frontend hears of from the engine, or caused itself
log = logging.getLogger(__name__)


class Vocabs(PerModel[Vocab]):
    """The vocabulary of each model."""

    def __init__(self, config: ServerConfig, load: Callable[[str], Vocab] = Vocab.load) -> None:
        super().__init__(config.models, lambda model: load(model.tokenizer or model.path))


class DetokWorker:
    """Implements pipeline.transport.Logic."""

    def __init__(self, config: ServerConfig, index: int, epoch: int, sender: Sender, registry: CollectorRegistry,
                 vocabs: Vocabs | None = None) -> None:
        self._index, self._epoch, self._sender = index, epoch, sender
        self._num_frontends, self._num_engines = config.frontends, len(config.engines())
        self._vocabs = vocabs or Vocabs(config)
        self._choices: dict[int, Choice] = {}
        self._waiting: dict[int, list[Choice]] = {}             # frontend -> choices with output, oldest first
        self._failed: dict[int, list[FailedItem]] = {}          # frontend -> failures to tell
        self._hits: deque[tuple[int, StopHit]] = deque()        # engine, hit
        self._engine_epochs: dict[int, int] = {}
        self._stuck = False                                     # an outbox refused at the last turn
        self._new_tokens = 0
        self._tokens = Counter("quartet:detok_tokens", "Output tokens turned into text.", registry=registry)
        self._stop_hits = Counter("quartet:detok_stop_hits", "Stop strings found.", registry=registry)
        self._dropped = Counter("quartet:detok_dropped", "Records that were dropped, by reason.", ["reason"],
                                registry=registry)
        Gauge("quartet:detok_choices", "Choices that are open.", registry=registry).set_function(
            lambda: len(self._choices))

    # ---- Logic ---------------------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        if not isinstance(message, StepOut):
            raise BadFrame("not for a detokenizer")
        if message.engine >= self._num_engines:
            raise BadFrame("from no engine of ours")
        # A newer epoch than the beacon's is ahead of its beacon and kills nobody: only a beacon tells of a death.
        if message.detok_epoch != self._epoch or message.engine_epoch < self._engine_epochs.get(message.engine, -1):
            self._dropped.labels(reason="old_epoch").inc()
            return
        try:
            rows = TOKEN_ROW.iter_unpack(message.rows)
        except struct.error:
            raise BadFrame("half a row") from None
        for opened in message.opens:
            self._open(opened, message.engine, message.engine_epoch)
        self._rows(rows)
        for out in message.items:
            self._token(out)

    def turn(self) -> None:
        """Send what waits."""
        if self._new_tokens:
            self._tokens.inc(self._new_tokens)
            self._new_tokens = 0
        self._stuck = False
        for frontend in list(self._waiting):
            self._send_deltas(frontend)
        for frontend, failures in list(self._failed.items()):
            if self._send(Address(Kind.FRONTEND, frontend),
                          Failed(Kind.DETOKENIZER, self._index, self._epoch, failures)):
                del self._failed[frontend]
        while self._hits:
            engine, hit = self._hits[0]
            if not self._send(Address(Kind.ENGINE, engine, "ctl"), hit):
                break
            self._hits.popleft()

    def has_work(self) -> bool:
        return False                          # `turn` leaves nothing but what an outbox refused

    def accepting(self) -> bool:
        return True                           # bounded by the text of the open choices

    def next_timer_ns(self) -> int | None:
        return time.monotonic_ns() + RETRY_NS if self._stuck else None

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        if kind is Kind.ENGINE:
            if epoch <= self._engine_epochs.get(index, -1):
                return
            self._engine_epochs[index] = epoch
            self._drop([c for c in self._choices.values() if c.engine == index and c.engine_epoch < epoch])
            self._hits = deque(entry for entry in self._hits if entry[0] != index)
        elif kind is Kind.FRONTEND:
            short = short_epoch(epoch)
            self._drop([c for c in self._choices.values()
                        if frontend_index(c.rid) == index and frontend_epoch(c.rid) != short])
            self._waiting[index] = [c for c in self._waiting.get(index, []) if frontend_epoch(c.rid) == short]
            self._failed.pop(index, None)

    def load(self) -> Load:
        return Load(running=len(self._choices))

    # ---- records -------------------------------------------------------------------------------------------------

    def _open(self, opened: Open, engine: int, engine_epoch: int) -> None:
        if opened.rid in self._choices:
            self._dropped.labels(reason="opened_twice").inc()
            return
        if frontend_index(opened.rid) >= self._num_frontends:
            self._dropped.labels(reason="misrouted").inc()
            return
        try:
            vocab = self._vocabs.get(opened.spec.model)
            choice = Choice(opened, vocab, engine, engine_epoch)
        except StartError as error:
            log.error("request %x: %s", opened.rid, error.message)
            self._fail(opened.rid, "internal_error", "The tokenizer of this model cannot be loaded.")
            return
        except Exception:
            log.exception("request %x: its detokenizer cannot be opened", opened.rid)
            self._fail(opened.rid, "internal_error", "The server failed to decode this request.")
            return
        self._choices[opened.rid] = choice
        if choice.stopped:
            self._hit(choice, choice.have)
            self._queue(choice)

    def _rows(self, rows: Iterable[tuple[int, int, int]]) -> None:
        """One id each, and nothing else: what nearly every token costs."""
        known, waiting = self._choices.get, self._waiting
        for rid, start, number in rows:
            choice = known(rid)
            try:
                alone = choice is not None and choice.push(start, number)
            except Exception:
                assert choice is not None
                self._broken(choice)
                continue
            if choice is None or not alone:
                self._token(TokenOut(rid, start, number.to_bytes(4, "little")))
                continue
            self._new_tokens += 1
            if not choice.waiting:
                choice.waiting = True
                waiting.setdefault(choice.frontend, []).append(choice)

    def _token(self, out: TokenOut) -> None:
        choice = self._choices.get(out.rid)
        if choice is None:
            self._dropped.labels(reason="unknown").inc()
            return
        if choice.stopped or (out.finish and out.finish in SILENT):
            if out.finish:
                del self._choices[out.rid]
                if not choice.stopped:
                    self._forget_output(choice)
            return
        try:
            hit = choice.apply(out)
        except Gap:
            log.error("request %x: ids are missing before %d", out.rid, out.start)
            self._drop([choice])
            self._fail(out.rid, "engine_unavailable", "A part of the answer was lost inside the server.")
            return
        except Exception:
            self._broken(choice)
            return
        self._new_tokens += len(out.ids) >> 2
        if out.finish:
            del self._choices[out.rid]
        elif hit is not None:
            self._hit(choice, hit)
        if hit is not None:
            self._stop_hits.inc()
        self._queue(choice)

    def _broken(self, choice: Choice) -> None:
        log.exception("request %x: decoding failed", choice.rid)
        self._drop([choice])
        self._fail(choice.rid, "internal_error", "The server failed to decode this request.")

    def _hit(self, choice: Choice, n_tokens: int) -> None:
        self._hits.append((choice.engine, StopHit(choice.rid, n_tokens)))

    def _queue(self, choice: Choice) -> None:
        if not choice.waiting:
            choice.waiting = True
            self._waiting.setdefault(choice.frontend, []).append(choice)

    def _drop(self, choices: list[Choice]) -> None:
        for choice in choices:
            del self._choices[choice.rid]
            if not choice.stopped:            # a stop string's last delta is complete, whoever is gone
                self._forget_output(choice)

    def _forget_output(self, choice: Choice) -> None:
        if choice.waiting:
            choice.waiting = False
            self._waiting[choice.frontend].remove(choice)

    def _fail(self, rid: int, code: str, message: str) -> None:
        self._failed.setdefault(frontend_index(rid), []).append(FailedItem(rid, code, message))

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, to: Address, message: Any) -> bool:
        taken = self._sender.send(to, message)
        self._stuck |= not taken
        return taken

    def _send_deltas(self, frontend: int) -> None:
        waiting, to = self._waiting[frontend], Address(Kind.FRONTEND, frontend)
        begin = 0
        while begin < len(waiting):
            if self._sender.pressure(to) >= 1.0:      # do not build what will not be taken
                self._stuck = True
                break
            message, count = self._deltas(waiting[begin:])
            if not self._send(to, message):
                break
            for choice in waiting[begin:begin + count]:
                choice.sent()
            begin += count
        if begin == len(waiting):
            del self._waiting[frontend]
        else:
            del waiting[:begin]

    def _deltas(self, choices: list[Choice]) -> tuple[Deltas, int]:
        """A message with what waits of the first choices, and how many they are: as many as fit."""
        items, rows, ids, texts = list[TextDelta](), bytearray(), array("I"), list[str]()
        size = count = chars = 0
        for choice in choices:
            if size + len(rows) + 2 * chars >= MAX_DELTAS_BYTES:
                break
            count += 1
            if choice.more:
                items.append(choice.delta())
                size += choice.size
            else:
                chars = choice.put_into(rows, ids, texts, chars)
        return Deltas(self._index, self._epoch, items, bytes(rows), ids.tobytes(), "".join(texts)), count

    def assert_invariants(self) -> None:
        """Called by tests after each step."""
        waiting = [(frontend, choice) for frontend, choices in self._waiting.items() for choice in choices]
        assert len({choice.rid for _, choice in waiting}) == len(waiting)
        for frontend, choice in waiting:
            assert choice.waiting and choice.frontend == frontend == frontend_index(choice.rid)
            assert choice.finish or self._choices.get(choice.rid) is choice
        for rid, choice in self._choices.items():
            assert choice.rid == rid and choice.engine_epoch >= self._engine_epochs.get(choice.engine, -1)
            assert choice.stopped or not choice.finish
            choice.assert_invariants()
