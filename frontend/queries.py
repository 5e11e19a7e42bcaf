"""Questions to a tokenizer (POST /tokenize, /detokenize): sent once, sent again when the tokenizer died.

Part of the request table, which runs it; the tokenizer's answer, a failure or the deadline is a query's one end.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from frontend.stages import Stages
from pipeline.errors import QuartetError
from pipeline.ids import RidMaker
from pipeline.messages import DetokenizeAnswer, DetokenizeQuery, Kind, TokenizeAnswer, TokenizeQuery
from pipeline.transport import Address, Sender

QueryMessage = Callable[[int, int], TokenizeQuery | DetokenizeQuery]     # (id, tokenizer's epoch) -> message
MAX_QUERIES = 1024


class Query:
    """One question. `answer` or `error` is set when `wake` is called."""

    __slots__ = ("make", "wake", "deadline_ns", "rid", "tokenizer", "epoch", "num_bytes", "answer", "error")

    def __init__(self, make: QueryMessage, wake: Callable[[], None], deadline_ns: int) -> None:
        self.make, self.wake, self.deadline_ns = make, wake, deadline_ns
        self.rid = 0
        self.tokenizer: int | None = None
        self.epoch = 0
        self.num_bytes = 0
        self.answer: TokenizeAnswer | DetokenizeAnswer | None = None
        self.error: QuartetError | None = None


class Queries:
    """The open questions of one frontend."""

    def __init__(self, rids: RidMaker, stages: Stages, sender: Sender, tokenizer_load: Counter[int],
                 now_ns: Callable[[], int]) -> None:
        self._rids, self._stages, self._sender, self._load, self._now_ns = rids, stages, sender, tokenizer_load, now_ns
        self._open: dict[int, Query] = {}

    def __len__(self) -> int:
        return len(self._open)

    def open(self, make: QueryMessage, wake: Callable[[], None], deadline_ns: int) -> Query:
        if len(self._open) >= MAX_QUERIES:
            raise QuartetError("server_overloaded", "The server has too many open questions; retry soon.")
        query = Query(make, wake, deadline_ns)
        self._send(query)
        return query

    def close(self, query: Query) -> None:
        """Forget a query; idempotent."""
        if self._open.pop(query.rid, None) is not None:
            self._unload(query)

    def answered(self, answer: TokenizeAnswer | DetokenizeAnswer) -> None:
        query = self._open.get(answer.rid)
        if query is not None:
            query.answer = answer
            self.close(query)
            query.wake()

    def failed(self, rid: int, error: QuartetError) -> bool:
        """End query `rid` with an error; False if there is none."""
        query = self._open.get(rid)
        if query is None:
            return False
        self._fail(query, error)
        return True

    def fail_all(self, error: QuartetError) -> None:
        for query in list(self._open.values()):
            self._fail(query, error)

    def tokenizer_restarted(self, index: int, epoch: int) -> None:
        for query in [q for q in self._open.values() if q.tokenizer == index and q.epoch != epoch]:
            self.close(query)
            self._send(query)

    def tick(self) -> None:
        now = self._now_ns()
        for query in list(self._open.values()):
            if now > query.deadline_ns:
                self._fail(query, QuartetError("timeout", "The tokenizer did not answer within the time limit."))
            elif query.tokenizer is None:
                self.close(query)
                self._send(query)

    def _send(self, query: Query) -> None:
        """Register under a fresh id and send; without a ready tokenizer or room it stays and `tick` tries again."""
        query.rid = self._rids.next()
        self._open[query.rid] = query
        index = self._stages.tokenizer(self._load)
        query.tokenizer = None
        if index is None:
            return
        query.epoch = self._stages.tokenizer_epoch(index)
        message = query.make(query.rid, query.epoch)
        if self._sender.send(Address(Kind.TOKENIZER, index), message):
            query.tokenizer, query.num_bytes = index, _size(message)
            self._load[index] += query.num_bytes

    def _unload(self, query: Query) -> None:
        if query.tokenizer is not None:
            self._load[query.tokenizer] -= query.num_bytes
            query.tokenizer = None

    def _fail(self, query: Query, error: QuartetError) -> None:
        query.error = error
        self.close(query)
        query.wake()


def _size(message: TokenizeQuery | DetokenizeQuery) -> int:
    if isinstance(message, DetokenizeQuery):
        return len(message.ids)
    return len(message.text or "") + (len(message.chat.messages_json) if message.chat else 0)
