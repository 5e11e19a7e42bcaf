"""What the engine tells detokenizers and frontends: grouped per step, merged while a destination does not take it.

Engine process, no torch. A box per destination is the step's message and, while the sender refuses it, the queue:
later output of a choice is merged into what waits, so that its size is bounded by the text. Must never block, and
closes every choice that it opened by exactly one TokenOut.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass, field

from engine_proc.request import Sequence
from pipeline.errors import QuartetError
from pipeline.ids import frontend_index
from pipeline.logprobs import join_logprobs
from pipeline.messages import (
    TOKEN_ROW,
    Admitted,
    AdmittedItem,
    Census,
    Failed,
    FailedItem,
    Finish,
    Kind,
    Logprobs,
    Open,
    StepOut,
    TokenOut,
    Usage,
    pack_rids,
)
from pipeline.params import MAX_LOGPROBS
from pipeline.transport import Address, Sender

LEFT_CONTEXT = 8                 # prompt ids that a detokenizer needs to begin a text rightly
MAX_PENDING_BYTES = 8 * 2**20    # waiting for one destination, about; past that it counts as stuck
RETRY_NS = 5_000_000             # how soon a destination that refused is tried again
HIGH_PRESSURE = 0.5
RECORD_BYTES = 64
MAX_IDLE_BOXES = 128             # more than there can be detokenizers: empty ones are those of epochs that never were
UNOPENED_ENDS = (Finish.ABORT, Finish.ERROR)     # a choice that ends so before its first token was never opened
NAN = struct.pack("<f", float("nan"))


@dataclass(slots=True)
class Box:
    """What waits for one detokenizer process or one frontend."""

    to: Address
    epoch: int = 0                                              # of a detokenizer
    opens: list[Open] = field(default_factory=list)
    items: dict[int, TokenOut] = field(default_factory=dict)
    rows: bytearray = field(default_factory=bytearray)          # of this step; ahead of `items`
    admitted: list[AdmittedItem] = field(default_factory=list)
    failed: list[FailedItem] = field(default_factory=list)
    census: Census | None = None
    retry_ns: int = 0                                           # refused: when to try again
    stuck: bool = False

    def __bool__(self) -> bool:
        return bool(self.rows or self.items or self.opens or self.admitted or self.failed or self.census)

    def keep(self) -> None:
        """The rows were refused: as items, what follows can be merged into them."""
        for rid, start, number in reversed([*TOKEN_ROW.iter_unpack(self.rows)]):
            waiting = self.items.setdefault(rid, TokenOut(rid, start, b""))
            waiting.start, waiting.ids = start, number.to_bytes(4, "little") + waiting.ids
        self.rows = bytearray()

    @property
    def size(self) -> int:
        """About how many bytes wait."""
        return (len(self.rows) + sum(RECORD_BYTES + len(o.left) + len(o.history) for o in self.opens)
                + sum(RECORD_BYTES + len(t.ids) + _size(t.logprobs) + _size(t.prompt_logprobs)
                      for t in self.items.values())
                + sum(RECORD_BYTES + len(a.ids) for a in self.admitted) + RECORD_BYTES * len(self.failed))


class Outputs:
    """Boxes for every destination of one engine."""

    def __init__(self, index: int, epoch: int, sender: Sender, max_pending_bytes: int = MAX_PENDING_BYTES) -> None:
        self._index, self._epoch, self._sender, self._max_pending = index, epoch, sender, max_pending_bytes
        self._detoks: dict[tuple[int, int], Box] = {}           # (index, epoch)
        self._frontends: dict[int, Box] = {}
        self._dead: dict[int, int] = {}                         # detokenizer -> its epoch; older ones are gone
        self.stalled: frozenset[int] = frozenset()              # detokenizers whose prompts should not start
        self.retry_ns: int | None = None                        # when `flush` is due again; None: nothing waits

    # ---- filling -------------------------------------------------------------------------------------------------

    def emit(self, seq: Sequence, logprobs: Logprobs | None = None) -> None:
        """What is new of `seq`: Open ahead of its first record, ids that were not sent, and its end."""
        route, finish = seq.route, seq.finish
        if route.detok_epoch < self._dead.get(route.detok, 0) or (not seq.opened and finish in UNOPENED_ENDS):
            return
        box = self._detoks.get((route.detok, route.detok_epoch))
        if box is None:
            box = Box(Address(Kind.DETOKENIZER, route.detok), route.detok_epoch)
            self._detoks[route.detok, route.detok_epoch] = box
        start, num_prompt = seq.num_sent, seq.num_prompt
        if (seq.opened and not finish and logprobs is None and not box.retry_ns and seq.rid not in box.items
                and len(seq.tokens) == num_prompt + start + 1):
            seq.num_sent = start + 1
            box.rows += TOKEN_ROW.pack(seq.rid, start, seq.tokens[-1])
            return
        ids = seq.tokens[num_prompt + start:].tobytes()
        seq.num_sent = start + (len(ids) >> 2)
        usage = prompt_logprobs = None
        if not seq.opened:
            if box.stuck:
                return                                          # nothing new for it; the census tells its frontend
            seq.opened = True
            whole = seq.detok.echo or seq.sampling.prompt_logprobs is not None
            first = num_prompt if seq.embeds is not None else 0 if whole else max(0, num_prompt - LEFT_CONTEXT)
            prompt = seq.tokens[first:num_prompt]
            history = seq.tokens[num_prompt:num_prompt + seq.num_history]
            box.opens.append(Open(seq.rid, seq.detok, prompt.tobytes(), history.tobytes()))
            usage = usage_of(seq)
            if seq.sampling.prompt_logprobs is not None:
                prompt_logprobs = whole_prompt(seq.prompt_logprobs, seq.sampling.prompt_logprobs)
                seq.prompt_logprobs = []
        elif finish:
            usage = usage_of(seq)
        waiting = box.items.get(seq.rid)
        if waiting is None:
            box.items[seq.rid] = TokenOut(seq.rid, start, ids, finish, seq.stop_id, logprobs, prompt_logprobs, usage)
            return
        waiting.ids += ids
        waiting.finish, waiting.stop_id, waiting.usage = finish, seq.stop_id, usage or waiting.usage
        if logprobs is not None:
            waiting.logprobs = logprobs if waiting.logprobs is None else join_logprobs([waiting.logprobs, logprobs])

    def admit(self, rid: int, ids: bytes) -> None:
        box = self._frontend(frontend_index(rid))
        if not box.stuck:
            box.admitted.append(AdmittedItem(rid, ids))

    def fail(self, rid: int, error: QuartetError) -> None:
        box = self._frontend(frontend_index(rid))
        if not box.stuck:
            box.failed.append(FailedItem(rid, error.code, error.message, error.param))

    def census(self, frontend: int, rids: list[int]) -> None:
        """`rids` and those whose last records wait here. A newer census takes the place of one that waits."""
        held = dict.fromkeys(rids)
        for box in self._detoks.values():
            waiting = (*box.items, *(rid for rid, _, _ in TOKEN_ROW.iter_unpack(box.rows)))
            held.update((rid, None) for rid in waiting if frontend_index(rid) == frontend)
        self._frontend(frontend).census = Census(self._index, self._epoch, pack_rids(held))

    def _frontend(self, index: int) -> Box:
        box = self._frontends.get(index)
        if box is None:
            box = self._frontends[index] = Box(Address(Kind.FRONTEND, index))
        return box

    # ---- sending -------------------------------------------------------------------------------------------------

    def flush(self, now: int) -> list[Box]:
        """Hand over what waits. Destinations that have just turned out to be stuck: their choices must end."""
        stuck, stalled = [], []
        self.retry_ns = None
        for boxes in (self._frontends.values(), self._detoks.values()):       # Admitted goes ahead of the first token
            for box in boxes:
                if box and box.retry_ns <= now and not self._send(box):
                    box.retry_ns = now + RETRY_NS
                    if not box.stuck and box.size > self._max_pending:
                        box.stuck = True
                        stuck.append(box)
                        if box.to.kind is Kind.FRONTEND:
                            box.admitted, box.failed = [], []
                if box:
                    self.retry_ns = box.retry_ns if self.retry_ns is None else min(self.retry_ns, box.retry_ns)
                else:
                    box.stuck, box.retry_ns = False, 0
                if box.to.kind is Kind.DETOKENIZER and (box or self._sender.pressure(box.to) >= HIGH_PRESSURE):
                    stalled.append(box.to.index)
        self.stalled = frozenset(stalled)
        if len(self._detoks) > MAX_IDLE_BOXES:
            self._detoks = {key: box for key, box in self._detoks.items() if box}
        return stuck

    def _send(self, box: Box) -> bool:
        send, to = self._sender.send, box.to
        for items in _parts(list(box.items.values())) if box.opens or box.items or box.rows else ():
            if not send(to, StepOut(self._index, self._epoch, box.epoch, box.opens, items, bytes(box.rows))):
                box.keep()
                return False
            box.opens, box.rows = [], bytearray()
            for out in items:
                del box.items[out.rid]
        if box.admitted:
            if not send(to, Admitted(self._index, self._epoch, box.admitted)):
                return False
            box.admitted = []
        if box.failed:
            if not send(to, Failed(Kind.ENGINE, self._index, self._epoch, box.failed)):
                return False
            box.failed = []
        if box.census is not None:
            if not send(to, box.census):
                return False
            box.census = None
        return True

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        """What waits for a predecessor of this process is worthless."""
        if kind is Kind.FRONTEND:
            self._frontends.pop(index, None)
        elif kind is Kind.DETOKENIZER:
            self._dead[index] = max(epoch, self._dead.get(index, 0))
            for key in [key for key in self._detoks if key[0] == index and key[1] < epoch]:
                del self._detoks[key]

    def __bool__(self) -> bool:
        """Whether anything waits."""
        return any(self._detoks.values()) or any(self._frontends.values())


def usage_of(seq: Sequence) -> Usage:
    kept = seq.num_output if seq.num_kept < 0 else min(seq.num_kept, seq.num_output)
    return Usage(seq.num_prompt, seq.num_cached, kept)


def whole_prompt(parts: list[Logprobs], k: int) -> Logprobs:
    """A prompt's logprobs: no values (NaN, rank 0) for its first token, then those of its chunks."""
    first = Logprobs(k, NAN, bytes(4), bytes(4 * k), NAN * k)
    return join_logprobs([first, *parts])


def _parts(items: list[TokenOut]) -> list[list[TokenOut]]:
    """The items as messages: one, unless so many log-probabilities are in them that it would be too large."""
    if not any(out.logprobs is not None and out.logprobs.k > MAX_LOGPROBS for out in items):
        return [items]
    parts, size = [list[TokenOut]()], 0
    for out in items:
        if size > MAX_PENDING_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(out)
        size += _size(out.logprobs) + _size(out.prompt_logprobs)
    return parts


def _size(logprobs: Logprobs | None) -> int:
    return 0 if logprobs is None else len(logprobs.values) * 2 + len(logprobs.top_ids) * 2
