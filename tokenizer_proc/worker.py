"""The tokenizer stage: submissions in, prompts to the engines out, failures straight back to the frontend.

Owns a bounded list of what waits, first come first served, one piece of work per turn, so that aborts are read between
two encodings. Holds nothing of a request once its Add was taken. One request's failure, whatever it is, ends that
request only; texts of users are never logged.
"""
from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, StartError
from pipeline.ids import family, frontend_epoch, frontend_index, short_epoch
from pipeline.messages import (
    Abort,
    Add,
    Adds,
    AudioCredit,
    Chat,
    DetokenizeAnswer,
    DetokenizeQuery,
    Failed,
    FailedItem,
    Kind,
    Load,
    PoolAdds,
    Submit,
    SubmitAudio,
    SubmitPool,
    TokenizeAnswer,
    TokenizeQuery,
    pack_ids,
    unpack_ids,
    unpack_rids,
)
from pipeline.per_model import PerModel
from pipeline.schema import BadFrame
from pipeline.transport import Address, Sender
from tokenizer_proc.audio.recordings import Recordings
from tokenizer_proc.checker import CHECK_S, GrammarChecker
from tokenizer_proc.grammar import compiled
from tokenizer_proc.limits import DeadlinePassed
from tokenizer_proc.load import TextModel
from tokenizer_proc.pool import PoolWork, Result
from tokenizer_proc.prompt import PromptMaker
from tokenizer_proc.words import resolve

MAX_PENDING = 4096
MAX_PENDING_BYTES = 128 * 2**20
MAX_UNSENT = 256                    # results that outboxes refused; with more, no new work is taken
MAX_UNSENT_BYTES = 64 * 2**20
MAX_CHECKING = 256                  # requests whose grammars are being checked
RETRY_NS = 2_000_000                # how soon an outbox that was full, or a grammar, is looked at again
POOL_TURN = 8                       # other requests that may go ahead of a slice of a pooling request
Work = Submit | TokenizeQuery | DetokenizeQuery | PoolWork
Message = Submit | SubmitPool | SubmitAudio | AudioCredit | TokenizeQuery | DetokenizeQuery
ROUTED = (Submit, SubmitPool, SubmitAudio)
log = logging.getLogger(__name__)


class TextModels(PerModel[TextModel]):
    """The tokenizer and templates of each model."""

    def __init__(self, config: ServerConfig, load: Callable[[ModelConfig], TextModel] = TextModel) -> None:
        super().__init__(config.models, load)


@dataclass(slots=True)
class Unsent:
    """A result that waits for room towards `to`."""

    to: Address
    message: Any
    size: int


@dataclass(slots=True)
class Checking:
    """An Add whose grammar is being checked."""

    result: Unsent
    param: str
    expires_ns: int


class TokenizerWorker:
    """Implements pipeline.transport.Logic."""

    def __init__(self, config: ServerConfig, index: int, epoch: int, sender: Sender, registry: CollectorRegistry,
                 models: TextModels | None = None, checker: GrammarChecker | None = None) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"        # one text at a time: threads would only fight the engine
        self._index, self._epoch, self._sender = index, epoch, sender
        self._num_frontends, self._num_engines = config.frontends, len(config.engines())
        self._models = models or TextModels(config)
        self._maker = PromptMaker(config.trust_request_chat_template, registry)
        self._pending: dict[int, Work] = {}                   # rid -> work, in order of arrival
        self._pools: dict[int, PoolWork] = {}                 # the same for pooling requests, in order of their next slice
        self._since_pool = 0                                  # pieces of other work since their last slice
        self._pending_bytes = 0
        self._unsent: deque[Unsent] = deque()
        self._unsent_bytes = 0
        self.recordings = Recordings(
            config.models, config.audio.max_seconds, self._send,
            lambda rid, error: self._fail(rid, error.code, error.message, error.param))
        self._checker = checker or GrammarChecker()
        self._checking: dict[int, Checking] = {}
        self._outcomes = Counter("quartet:tokenizer_requests", "Requests that were worked on, by outcome.", ["outcome"],
                                 registry=registry)
        self._dropped = Counter("quartet:tokenizer_dropped", "Messages that were dropped, by reason.", ["reason"],
                                registry=registry)
        Gauge("quartet:tokenizer_pending", "Requests that wait for the tokenizer.", registry=registry).set_function(
            lambda: len(self._pending) + len(self._pools) + len(self.recordings))

    # ---- Logic ---------------------------------------------------------------------------------------------------

    def handle(self, message: Any) -> None:
        if isinstance(message, Abort):
            rids = _rids(message)
            for rid in rids:
                self._forget(rid)
                self._checking.pop(rid, None)
            if self._unsent:
                self._discard(lambda rid: rid in rids)
        elif not isinstance(message, (Submit, SubmitPool, SubmitAudio, AudioCredit, TokenizeQuery, DetokenizeQuery)):
            raise BadFrame("not for a tokenizer")
        elif self._misrouted(message):
            raise BadFrame("from no frontend or for no engine of ours")
        elif self._epoch_of(message) != self._epoch:
            self._dropped.labels(reason="old_epoch").inc()
        elif isinstance(message, AudioCredit):
            self.recordings.grant(message.rid, message.credit)
        elif any(message.rid in held for held in (self._pending, self._pools, self._checking, self.recordings)):
            self._dropped.labels(reason="twice").inc()
        elif isinstance(message, SubmitAudio):
            self.recordings.submit(message)
        elif isinstance(message, SubmitPool):
            self._pools[message.rid] = PoolWork(message)
            self._pending_bytes += _size(self._pools[message.rid])
        else:
            self._pending[message.rid] = message
            self._pending_bytes += _size(message)

    def turn(self) -> None:
        """One piece of work, and what waits to be sent."""
        if self._unsent:
            self._retry()
        if self._unsent_bytes < MAX_UNSENT_BYTES:
            self.recordings.turn()
        if self._checking:
            self._take_checked()
        if self.has_work():
            work = self._next()
            if not self._work(work):
                self._pools[work.rid] = self._pools.pop(work.rid)      # type: ignore[assignment]  # to the end of the line

    def _next(self) -> Work:
        """What to work on: a chat goes ahead of slices of large requests, but not for ever."""
        if self._pending and (not self._pools or self._since_pool < POOL_TURN):
            self._since_pool += 1
            work = self._forget(next(iter(self._pending)))
            assert work is not None
            return work
        self._since_pool = 0
        return next(iter(self._pools.values()))

    def has_work(self) -> bool:
        return (bool(self._pending or self._pools) and len(self._unsent) < MAX_UNSENT
                and self._unsent_bytes < MAX_UNSENT_BYTES)

    def accepting(self) -> bool:
        return (len(self._pending) + len(self._pools) < MAX_PENDING and self._pending_bytes < MAX_PENDING_BYTES
                and len(self._unsent) < MAX_UNSENT and self._unsent_bytes < MAX_UNSENT_BYTES
                and len(self._checking) < MAX_CHECKING)

    def next_timer_ns(self) -> int | None:
        return (time.monotonic_ns() + RETRY_NS if self._unsent or self._checking else self.recordings.next_timer_ns())

    def peer_restarted(self, kind: Kind, index: int, epoch: int) -> None:
        if kind is Kind.FRONTEND:
            short = short_epoch(epoch)
            gone = [rid for rid in (*self._pending, *self._pools, *self.recordings.rids())
                    if frontend_index(rid) == index and frontend_epoch(rid) != short]
            self._discard(lambda rid: frontend_index(rid) == index and frontend_epoch(rid) != short)
        elif kind is Kind.ENGINE:
            routes = [(rid, work.route) for rid, work in self._pending.items() if isinstance(work, Submit)]
            routes += [(rid, work.submit.route) for rid, work in self._pools.items()] + self.recordings.routes()
            gone = [rid for rid, route in routes if route.engine == index and route.engine_epoch < epoch]
            self._discard(lambda rid: False, Address(Kind.ENGINE, index), epoch)
        else:
            return
        for rid in gone:
            self._forget(rid)
        for rid in [rid for rid in self._checking if kind is Kind.FRONTEND and frontend_index(rid) == index
                    and frontend_epoch(rid) != short_epoch(epoch)]:
            del self._checking[rid]

    def load(self) -> Load:
        return Load(waiting=len(self._pending) + len(self._pools) + len(self.recordings), outstanding_bytes=self._pending_bytes)

    # ---- work ----------------------------------------------------------------------------------------------------

    def _work(self, work: Work) -> bool:
        """Everything that can go wrong with one request ends here. False: more of it is to be done."""
        try:
            results = self._slice(work) if isinstance(work, PoolWork) else [self._result(work)]
            if not results:
                return False
        except QuartetError as error:
            self._fail(work.rid, error.code, error.message, error.param)
        except StartError as error:
            log.error("request %x: %s", work.rid, error.message)
            self._fail(work.rid, "internal_error", "The tokenizer of this model cannot be loaded.")
        except (Exception, DeadlinePassed) as error:
            where = error.__traceback__
            while where is not None and where.tb_next is not None:
                where = where.tb_next
            place = f"{where.tb_frame.f_code.co_filename}:{where.tb_lineno}" if where is not None else "nowhere"
            log.error("request %x: %s at %s", work.rid, type(error).__name__, place)
            self._fail(work.rid, "internal_error", "The server failed to tokenize this request.")
        else:
            for to, message, size in results:
                self._hand_over(work, Unsent(to, message, size))
        self._forget(work.rid)
        return True

    def _hand_over(self, work: Work, result: Unsent) -> None:
        """Send a result, once the grammar that it carries is known to be good."""
        if isinstance(work, Submit) and not work.history:
            grammar = result.message.items[0].sampling.grammar
            if grammar is not None and not self._checker.knows(grammar.text):
                expires = time.monotonic_ns() + int(CHECK_S * 1e9)
                self._checking[work.rid] = Checking(result, grammar.param, expires)
                self._checker.submit(work.rid, grammar.text)
                return
        self._outcomes.labels(outcome="ok").inc()
        self._send(result.to, result.message, result.size)

    def _take_checked(self) -> None:
        """Send what was found good; refuse the rest, and what takes too long."""
        for rid, error in self._checker.take():
            entry = self._checking.pop(rid, None)
            if entry is None:
                continue                                      # aborted, or refused for its time
            if error is not None:
                self._fail(rid, error.code, error.message, entry.param)
            else:
                self._outcomes.labels(outcome="ok").inc()
                self._send(entry.result.to, entry.result.message, entry.result.size)
        now = time.monotonic_ns()
        for rid in [rid for rid, entry in self._checking.items() if entry.expires_ns <= now]:
            param = self._checking.pop(rid).param
            self._fail(rid, "invalid_value", "The grammar of this request takes too long to check.", param)

    def _slice(self, work: PoolWork) -> list[Result]:
        """Encode some inputs; once all are good, the messages that hand them over."""
        work.advance(self._models.get(work.submit.model), self._maker)
        return list(work.results(self._index, self._epoch)) if work.done else []

    def _result(self, work: Submit | TokenizeQuery | DetokenizeQuery) -> Result:
        """Where the result goes, the result, and about how large it is."""
        if isinstance(work, Submit):
            ids = work.ids
            if work.deadline_ns and time.monotonic_ns() > work.deadline_ns:
                raise QuartetError("timeout", "The request waited longer than its deadline allows.")
            if not (work.history and ids):    # a continuation was checked when it was new
                ids = pack_ids(self._maker.prompt_ids(self._models.get(work.model), work))
            sampling = work.sampling
            if sampling.bad_words or sampling.thinking is not None:
                sampling = resolve(self._models.get(work.model), sampling)
            if sampling.grammar is not None:
                grammar = compiled(sampling.grammar, self._models.get(work.model).tokenizer, unpack_ids(ids),
                                   work.detok.reasoning_parser)
                sampling = dataclasses.replace(sampling, grammar=grammar)
            add = Add(work.rid, work.route, work.n, work.choice, ids, work.history, sampling, work.detok,
                      work.deadline_ns, work.priority, work.salt, work.alone, work.embeds)
            size = len(ids) + len(work.history) + 200 + _extras(work)
            return Address(Kind.ENGINE, work.route.engine), Adds([add]), size
        model, to = self._models.get(work.model), Address(Kind.FRONTEND, frontend_index(work.rid))
        if isinstance(work, TokenizeQuery):
            numbers = self._maker.query_ids(model, work)
            strings = [model.tokenizer.id_to_token(i) or "" for i in numbers] if work.want_strings else None
            return to, TokenizeAnswer(work.rid, pack_ids(numbers), strings), 12 * len(numbers)
        numbers = unpack_ids(work.ids)
        model.check_ids(numbers, "tokens")
        text = model.tokenizer.decode(list(numbers), skip_special_tokens=False)
        return to, DetokenizeAnswer(work.rid, text), len(text)

    def _fail(self, rid: int, code: str, message: str, param: str | None = None) -> None:
        self._outcomes.labels(outcome=code).inc()
        self._send(Address(Kind.FRONTEND, frontend_index(rid)),
                   Failed(Kind.TOKENIZER, self._index, self._epoch, [FailedItem(rid, code, message, param)]), 200)

    def _misrouted(self, work: Message) -> bool:
        """Whether a process that does not exist is named: no socket is ever made towards those."""
        return (frontend_index(work.rid) >= self._num_frontends
                or (isinstance(work, ROUTED) and work.route.engine >= self._num_engines))

    def _epoch_of(self, work: Message) -> int:
        return work.route.tokenizer_epoch if isinstance(work, ROUTED) else work.tokenizer_epoch

    def _forget(self, rid: int) -> Work | None:
        """Take work off the list; None when it is not there, which is normal for an abort."""
        self.recordings.forget(rid)
        work = self._pending.pop(rid, None) or self._pools.pop(rid, None)
        if work is not None:
            self._pending_bytes -= _size(work)
        return work

    # ---- sending -------------------------------------------------------------------------------------------------

    def _send(self, to: Address, message: Any, size: int) -> None:
        """Keeps what is refused, in order for each destination."""
        if any(entry.to == to for entry in self._unsent) or not self._sender.send(to, message):
            self._unsent.append(Unsent(to, message, size))
            self._unsent_bytes += size

    def _retry(self) -> None:
        refused: set[Address] = set()
        kept: deque[Unsent] = deque()
        for entry in self._unsent:
            if entry.to in refused or not self._sender.send(entry.to, entry.message):
                refused.add(entry.to)
                kept.append(entry)
        self._keep(kept)

    def _discard(self, gone: Callable[[int], bool], engine: Address | None = None, engine_epoch: int = 0) -> None:
        """Drop results whose request, or whose engine, is gone."""
        self._keep(deque(entry for entry in self._unsent if not (
            gone(_rid_of(entry.message)) or (
                entry.to == engine and _first(entry.message).route.engine_epoch < engine_epoch))))

    def _keep(self, entries: deque[Unsent]) -> None:
        self._unsent = entries
        self._unsent_bytes = sum(entry.size for entry in entries)

    def assert_invariants(self) -> None:
        """Called by tests after each step."""
        assert self._pending_bytes == sum(map(_size, (*self._pending.values(), *self._pools.values()))) >= 0
        assert self._unsent_bytes == sum(entry.size for entry in self._unsent)
        assert all(rid == work.rid for rid, work in (*self._pending.items(), *self._pools.items()))


def _rids(message: Abort) -> set[int]:
    """The submissions that an Abort names; a child's abort leaves its siblings, so the engine applies it alone."""
    try:
        return {rid for rid in unpack_rids(message.rids) if rid == family(rid)}
    except ValueError:                        # no whole ids
        return set()


def _first(message: Any) -> Any:
    """The record in a message that tells whose it is."""
    return message.items[0] if isinstance(message, (Adds, PoolAdds, Failed)) else message


def _rid_of(message: Any) -> int:
    """The request that a result is for."""
    return int(_first(message).rid)


def _size(work: Work) -> int:
    """About the bytes that `work` holds."""
    if isinstance(work, DetokenizeQuery):
        return 200 + len(work.ids)
    if isinstance(work, PoolWork):
        return 500 + sum(200 + len(t.text or "") + len(t.pair or "") + len(t.ids) + (_chat_size(t.chat) if t.chat else 0)
                         for t in work.submit.inputs)
    size = 500 + len(work.text or "") + (len(work.suffix or "") if isinstance(work, Submit) else 0)
    if work.chat is not None:
        size += _chat_size(work.chat)
    if isinstance(work, Submit):
        size += len(work.ids) + len(work.history) + _extras(work)
    return size


def _chat_size(chat: Chat) -> int:
    return (len(chat.messages_json) + len(chat.tools_json) + len(chat.kwargs_json) + len(chat.documents_json)
            + len(chat.template or ""))


def _extras(work: Submit) -> int:
    """Bytes of what may be large beside the prompt: a grammar, embeddings."""
    grammar, embeds = work.sampling.grammar, work.embeds
    return (len(grammar.text) if grammar is not None else 0) + (embeds.nbytes if embeds is not None else 0)
