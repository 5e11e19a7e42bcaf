"""The real Sanic application on a real socket, with a pipeline of paper behind it that answers what prompts ask for.

Prompts: "hang" is admitted and never answered, "fail CODE" fails, "say a|b|c" answers in these pieces, "count N" in N
pieces, anything else answers "Hello", " there", "!". Answers come by themselves, or step by step when a test says so.
"""
from __future__ import annotations

import asyncio
import json
import math
import socket
import time
import uuid
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry
from sanic import Sanic

from detok_proc.choice import Choice
from frontend.admission import Admission
from frontend.keys import Keys
from frontend.metrics import FrontendMetrics
from frontend.pools import size_of
from frontend.server import Frontend, build_app, prepare, serve
from frontend.stages import Stages
from frontend.table import RequestTable
from pipeline import tls
from pipeline.beacon import Heard
from pipeline.config import ServerConfig
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    Admitted,
    AdmittedItem,
    Deltas,
    DetokenizeAnswer,
    DetokenizeQuery,
    Failed,
    FailedItem,
    Finish,
    Kind,
    Logprobs,
    Open,
    Pooled,
    PoolHanded,
    PoolText,
    SpeechSegment,
    SpeechWord,
    Submit,
    SubmitAudio,
    SubmitPool,
    TextDelta,
    TokenizeAnswer,
    TokenizeQuery,
    TokenOut,
    Transcribed,
    Usage,
    pack_ids,
    unpack_ids,
    unpack_rids,
)
from pipeline.metrics import snapshot
from pipeline.params import PoolParams
from pipeline.transport import Address
from tests.detok_proc.test_answer import ids_of, vocab
from tests.frontend.world import beacon, config


def logprobs(ids: list[int], k: int, texts: list[str], first_unknown: bool = False) -> Logprobs:
    """Token i has log-probability -(i + 1) / 4 and rank 1; the alternatives follow at -1, -2 ..."""
    values = [math.nan if first_unknown and not i else -(i + 1) / 4 for i in range(len(ids))]
    top = [[ids[i], *range(100, 99 + k)][:k] for i in range(len(ids))]
    return Logprobs(
        k, array("f", values).tobytes(), pack_ids([1] * len(ids)), pack_ids(sum(top, [])),
        array("f", [-1.0 * (j + 1) for _ in ids for j in range(k)]).tobytes(), [t.encode() for t in texts],
        [texts[i].encode() if j == 0 else f"alt{j}".encode() for i in range(len(ids)) for j in range(k)])


def vector(text: PoolText, params: PoolParams) -> np.ndarray:
    """[1 or tokens, D]: embeddings count letters ("ab" is (1, 1, 0, 0)), classes and scores are (share of "a", of "b").

    A pair's score is the share of its second text's letters that the first one has.
    """
    words = text.text or "".join(map(chr, unpack_ids(text.ids)))
    if text.chat is not None and text.text is None:
        words = json.loads(text.chat.messages_json)[-1]["content"]
    if params.task == "score":
        return np.array([[sum(c in words for c in text.pair or "") / max(1, len(text.pair or ""))]], np.float32)
    if params.task == "classify":
        rows = np.array([[words.count("a") / len(words), words.count("b") / len(words)]], np.float32)
    else:
        pieces = list(words) if params.task == "token_embed" else [words]
        rows = np.array([[piece.count(letter) for letter in "abcd"] for piece in pieces], np.float32)
        rows = rows[:, :params.dimensions or None]
        if params.activation is not False:
            rows /= np.maximum(1e-9, np.linalg.norm(rows, axis=-1, keepdims=True))
    return rows


class PaperPipeline:
    """A Sender that answers like tokenizer, engine and detokenizer together."""

    def __init__(self) -> None:
        self.table: RequestTable | None = None
        self.aborted: set[int] = set()
        self.submits: list[Submit] = []
        self.pools: list[SubmitPool] = []
        self.recordings: list[SubmitAudio] = []
        self.manual = False                  # tests call `step` themselves
        self.full = False
        self._steps: list[Any] = []
        self._loop = asyncio.get_running_loop()

    def send(self, to: Address, message: Any) -> bool:
        if self.full:
            return False
        if isinstance(message, Abort):
            self.aborted.update(unpack_rids(message.rids))
        elif isinstance(message, Submit):
            self.submits.append(message)
            self._steps += [self._play(message)]
            if not self.manual:
                self._loop.call_soon(self.run)
        elif isinstance(message, SubmitPool):
            self.pools.append(message)
            self._steps += [self._pool(message)]
            if not self.manual:
                self._loop.call_soon(self.run)
        elif isinstance(message, SubmitAudio):
            self.recordings.append(message)
            self._steps += [self._hear(message)]
            if not self.manual:
                self._loop.call_soon(self.run)
        elif isinstance(message, TokenizeQuery):
            text = message.text if message.text is not None else "".join(
                m["content"] for m in json.loads(message.chat.messages_json))  # type: ignore[union-attr]
            answer = TokenizeAnswer(message.rid, pack_ids(map(ord, text)), list(text) if message.want_strings else None)
            self._loop.call_soon(self._handle, answer)
        elif isinstance(message, DetokenizeQuery):
            text = "".join(map(chr, unpack_ids(message.ids)))
            self._loop.call_soon(self._handle, DetokenizeAnswer(message.rid, text))
        return True

    def pressure(self, to: Address) -> float:
        return 0.0

    def run(self) -> None:
        """Play every submission to its end."""
        while self.step():
            pass

    def step(self) -> bool:
        """The next message of the oldest submission; False when there is none."""
        while self._steps:
            message = next(self._steps[0], None)
            if message is not None:
                self._handle(message)
                return True
            self._steps.pop(0)
        return False

    def next_one(self) -> None:
        """The next oldest submission is the one that steps."""
        self._steps.append(self._steps.pop(0))

    def _handle(self, message: Any) -> None:
        assert self.table is not None
        self.table.handle(message)
        self.table.assert_invariants()

    def _play(self, submit: Submit) -> Any:
        text = submit.text
        if text is None:
            text = json.loads(submit.chat.messages_json)[-1]["content"] if submit.chat else "ids"
        if text.startswith("fail "):
            yield Failed(Kind.TOKENIZER, 0, 1, [FailedItem(submit.rid, text.split()[1], "as you asked", "prompt")])
            return
        if submit.detok.tool_parser or submit.detok.reasoning_parser:
            yield from self._parsed(submit, text)
            return
        ids = [ord(c) % 1000 for c in text]
        yield Admitted(submit.route.engine, submit.route.engine_epoch, [AdmittedItem(submit.rid, pack_ids(ids))])
        if text == "hang":
            return
        pieces = ["Hello", " there", "!"]
        if text.startswith("say "):
            pieces = text[4:].split("|")
        elif text.startswith("count "):
            pieces = [f"{i} " for i in range(int(text.split()[1]))]
        sampling = submit.sampling
        finish = Finish.LENGTH if sampling.max_tokens <= len(pieces) else Finish.EOS
        pieces = pieces[:sampling.max_tokens]
        usage = Usage(len(ids), 1, 0)
        if not pieces:
            yield self._delta(submit, 0, "", 0, [], Finish.LENGTH, 0, ids, text, usage)
        offset = 0
        for i, piece in enumerate(pieces):
            for j in range(submit.n):
                yield self._delta(submit, j, piece, i, [10 + i], finish if i == len(pieces) - 1 else Finish.RUNNING,
                                  offset, ids, text, usage if i == 0 else None)
            offset += len(piece)

    def _parsed(self, submit: Submit, text: str) -> Any:
        """The text itself as the answer, a token at a time, by a real detokenizer's choices."""
        ids = ids_of(text)[:submit.sampling.max_tokens]
        yield Admitted(submit.route.engine, submit.route.engine_epoch, [AdmittedItem(submit.rid, pack_ids([5]))])
        choices = [Choice(Open(submit.rid + j, submit.detok, b"", b""), vocab("byte_level"), 0, 1)
                   for j in range(submit.n)]
        for n, number in enumerate(ids):
            end = Finish.RUNNING
            if n == len(ids) - 1:
                end = Finish.LENGTH if len(ids) == submit.sampling.max_tokens else Finish.EOS
            for choice in choices:
                if not choice.stopped:
                    found = None if submit.sampling.logprobs is None else logprobs([number], 1, ["?"])
                    choice.apply(TokenOut(choice.rid, n, pack_ids([number]), logprobs=found, usage=Usage(1, 0, 0)))
                    if end and not choice.stopped:
                        choice.apply(TokenOut(choice.rid, n + 1, b"", end))
                    yield Deltas(0, 1, [choice.delta()])
                    choice.sent()

    def _pool(self, submit: SubmitPool) -> Any:
        """Results in slices of two, the last one first. "hang" has none, "fail CODE" fails. See `vector`."""
        for text in submit.inputs:
            if (text.text or "").startswith("fail "):
                code = str(text.text).split()[1]
                yield Failed(Kind.TOKENIZER, 0, 1, [FailedItem(
                    submit.rid, code, f"'input[{text.index}]' is bad", f"input[{text.index}]")])
                return
        yield PoolHanded(0, 1, submit.rid)
        todo = [t for t in submit.inputs if t.text != "hang"][::-1]
        for part in (todo[i:i + 2] for i in range(0, len(todo), 2)):
            rows = [vector(t, submit.params) for t in part]
            yield Pooled(
                submit.route.engine, submit.route.engine_epoch, submit.rid, pack_ids(t.index for t in part),
                pack_ids(size_of(t) - 1 for t in part), pack_ids(map(len, rows)), np.concatenate(rows))

    def _hear(self, submit: SubmitAudio) -> Any:
        """A recording of paper holds what is said: windows of ten seconds between "|", their segments between "/".

        The windows come back last one first; "hang" never does, "fail" is refused.
        """
        spoken = Path(submit.path).read_text()
        if spoken == "fail":
            yield Failed(Kind.TOKENIZER, 0, 1, [FailedItem(submit.rid, "invalid_value", "The audio file is bad.", "file")])
            return
        windows = spoken.split("|")
        for i in reversed(range(len(windows))):
            if windows[i] != "hang":
                yield Transcribed(submit.route.engine, submit.route.engine_epoch, submit.rid, i, i == len(windows) - 1,
                                  10.0 * i, 10.0 if i < len(windows) - 1 else 7.5, submit.params.language or "en", 7,
                                  [self._segment(submit, i, n, part) for n, part in enumerate(windows[i].split("/"))])

    def _segment(self, submit: SubmitAudio, window: int, number: int, text: str) -> SpeechSegment:
        start = 10.0 * window + 2.5 * number
        words = [SpeechWord(start + 0.25 * i, start + 0.25 * i + 0.25, f" {w}", 0.5)
                 for i, w in enumerate(text.split())] if submit.params.words else []
        return SpeechSegment(start, start + 2.5, f" {text}", pack_ids([5, 6]), 0.0, -0.25, 1.5, 0.125, words)

    def _delta(self, submit: Submit, j: int, piece: str, start: int, ids: list[int], finish: Finish, offset: int,
               prompt: list[int], text: str, usage: Usage | None) -> Deltas:
        sampling, first = submit.sampling, start == 0
        found = None if sampling.logprobs is None else logprobs(ids, sampling.logprobs, [piece] * len(ids))
        told = None
        if first and sampling.prompt_logprobs is not None:
            told = logprobs(prompt, sampling.prompt_logprobs, list(text), first_unknown=True)
        return Deltas(0, 1, [TextDelta(
            submit.rid + j, offset, piece, start, pack_ids(ids), finish, None, found,
            text if first and submit.detok.echo else None, told, usage)])


class Served:
    """A frontend that listens."""

    def __init__(self, server_config: ServerConfig) -> None:
        self.pipeline = PaperPipeline()
        self.latest = {m: Heard(beacon(*m), time.monotonic_ns()) for m in server_config.members()}
        self.stages = Stages(server_config, self.latest, time.monotonic_ns)
        self.stages.note()
        self.registry = CollectorRegistry()
        metrics = FrontendMetrics(server_config, self.registry)
        self.table = RequestTable(RidMaker(1, 1), self.stages, self.pipeline, time.monotonic_ns, metrics)
        self.pipeline.table = self.table
        self.admission = Admission(server_config.limits)
        self.keys = Keys(server_config.http)
        self.frontend = Frontend(server_config, self.table, self.stages, self.admission, metrics, self.keys,
                                 lambda: {(Kind.FRONTEND, 0): snapshot(self.registry)})
        self.app, _ = build_app(self.frontend, f"quartet-{uuid.uuid4().hex}")
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def idle(self) -> None:
        """Wait until no request is open; what is left then is a leak."""
        for _ in range(500):
            if not len(self.table):
                break
            await asyncio.sleep(0.01)
        assert len(self.table) == 0 and self.admission.requests == 0
        self.admission.assert_invariants()
        self.table.assert_invariants()


@asynccontextmanager
async def served(**changes: Any) -> AsyncIterator[Served]:
    """Run a frontend in this loop; every request must be closed in the end."""
    Sanic.test_mode = True                   # lets Sanic compile its protocol anew for each application
    server = Served(config(**changes))
    sock = socket.create_server(("127.0.0.1", 0))
    prepare(sock)
    server.port = sock.getsockname()[1]
    tls_config = server.frontend.config.http.tls
    running = await serve(server.app, sock, None if tls_config.certfile is None else tls.context(tls_config))
    try:
        yield server
        await server.idle()
    finally:
        running.close()
        for connection in list(running.connections):
            connection.abort()
        await asyncio.sleep(0)
        Sanic.unregister_app(server.app)
