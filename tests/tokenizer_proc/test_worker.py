"""The tokenizer's list of work: order, bounds, aborts, epochs, refusals, and failures that end one request only."""
from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from pipeline import codec
from pipeline.config import ModelConfig, ServerConfig
from pipeline.ids import RidMaker
from pipeline.messages import (
    Abort,
    Adds,
    Chat,
    DetokenizeAnswer,
    DetokenizeQuery,
    Failed,
    Kind,
    Route,
    StopHit,
    Submit,
    TokenizeAnswer,
    TokenizeQuery,
    pack_ids,
    pack_rids,
    unpack_ids,
)
from pipeline.params import DetokSpec, SamplingParams
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests.detok_proc import zoo
from tokenizer_proc.load import TextModel
from tokenizer_proc.worker import TokenizerWorker

ENGINE, FRONTEND = Address(Kind.ENGINE, 2), Address(Kind.FRONTEND, 1)
TEMPLATE = "{% for m in messages %}{% if m.role == 'bomb' %}{% for i in range(10**9) %}{% endfor %}{% endif %}" \
           "<|im_start|>{{ m.content }}{% endfor %}"


class Sent:
    """A scripted sender: keeps what it takes, refuses the addresses in `full`."""

    def __init__(self) -> None:
        self.messages: list[tuple[Address, Any]] = []
        self.full: set[Address] = set()

    def send(self, to: Address, message: Any) -> bool:
        if to in self.full:
            return False
        self.messages.append((to, codec.decode(codec.encode(message))))
        return True

    def pressure(self, to: Address) -> float:
        return 1.0 if to in self.full else 0.0

    def take(self) -> list[tuple[Address, Any]]:
        taken, self.messages = self.messages, []
        return taken


class Bench:
    """One worker (index 4, epoch 3) with a good model and a broken one."""

    def __init__(self, tmp_path: Path) -> None:
        zoo.save(zoo.byte_level(), tmp_path / "good", {"bos_token": "<s>", "chat_template": TEMPLATE})
        self.sent, self.registry, self.rids = Sent(), CollectorRegistry(), RidMaker(1, 9)
        self.worker = TokenizerWorker(ServerConfig(run_dir="", log_dir="", frontends=2, models=(
            ModelConfig(names=("good",), path=str(tmp_path / "good"), max_model_len=64, replicas=2),
            ModelConfig(names=("broken",), path=str(tmp_path / "broken")))), 4, 3, self.sent, self.registry)

    def submit(self, text: str | None = "The dog", rid: int | None = None, model: int = 0, chat: Chat | None = None,
               ids: bytes = b"", history: bytes = b"", route: Route | None = None, **more: Any) -> int:
        rid = rid or self.rids.next()
        more = {"n": 1, "choice": 0, "add_special": False, "truncate": None, "deadline_ns": 0, **more}
        self.handle(Submit(rid, route or Route(4, 3, 2, 5, 0, 6), model, more.pop("n"), more.pop("choice"), text, chat,
                           ids, history, more.pop("add_special"), more.pop("truncate"), SamplingParams(max_tokens=77),
                           DetokSpec(stop=["x"]), more.pop("deadline_ns"), **more))
        return rid

    def handle(self, message: Any) -> None:
        self.worker.handle(codec.decode(codec.encode(message)))
        self.worker.assert_invariants()

    def turn(self) -> list[tuple[Address, Any]]:
        self.worker.turn()
        self.worker.assert_invariants()
        return self.sent.take()

    def finish(self) -> list[tuple[Address, Any]]:
        while self.worker.has_work():
            self.worker.turn()
            self.worker.assert_invariants()
        return self.sent.take()

    def dropped(self, reason: str) -> float:
        return self.registry.get_sample_value("quartet:tokenizer_dropped_total", {"reason": reason}) or 0.0


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def rids_of(sent: list[tuple[Address, Any]]) -> list[int]:
    return [item.rid for _, message in sent for item in message.items]


def failures(sent: list[tuple[Address, Any]]) -> list[tuple[int, str]]:
    for to, message in sent:
        if isinstance(message, Failed):
            assert to == FRONTEND and (message.kind, message.index, message.epoch) == (Kind.TOKENIZER, 4, 3)
    return [(item.rid, item.code) for _, message in sent if isinstance(message, Failed) for item in message.items]


# ---- what comes out ----------------------------------------------------------------------------------------------

def test_a_submission_becomes_one_add_for_its_engine_with_everything_else_untouched(bench: Bench) -> None:
    rid = bench.submit(n=3, choice=1, priority=-4, salt=b"s", alone=True, deadline_ns=time.monotonic_ns() + 10**12)
    [(to, adds)] = bench.turn()
    [add] = adds.items
    assert to == ENGINE and isinstance(adds, Adds)
    assert (add.rid, add.n, add.choice, add.priority, add.salt, add.alone) == (rid, 3, 1, -4, b"s", True)
    assert list(unpack_ids(add.ids)) == zoo.byte_level().encode("The dog").ids and add.history == b""
    assert add.route == Route(4, 3, 2, 5, 0, 6) and add.deadline_ns > 0
    assert add.sampling == SamplingParams(max_tokens=77) and add.detok == DetokSpec(stop=["x"])
    assert not bench.worker.has_work() and bench.worker.load().outstanding_bytes == 0


def test_one_piece_of_work_is_done_per_turn_in_the_order_of_arrival(bench: Bench) -> None:
    rids = [bench.submit() for _ in range(3)]
    assert bench.worker.has_work() and bench.worker.load().waiting == 3 and bench.worker.load().outstanding_bytes > 0
    assert [rids_of(bench.turn()) for _ in range(4)] == [[rids[0]], [rids[1]], [rids[2]], []]


def test_chats_ids_and_texts_are_prompts(bench: Bench) -> None:
    chat = Chat(json.dumps([{"role": "user", "content": "dog"}]).encode())
    bench.submit(text=None, chat=chat)
    bench.submit(text=None, ids=pack_ids([7, 8]))
    bench.submit(text="dog", add_special=True)
    prompts = [list(unpack_ids(message.items[0].ids)) for _, message in bench.finish()]
    dog, start = zoo.byte_level().encode("dog").ids, zoo.token(zoo.byte_level(), "<|im_start|>")
    assert prompts == [[start, *dog], [7, 8], dog]


def test_a_continuation_carries_its_ids_and_is_not_checked_again(bench: Bench) -> None:
    """It was admitted once: neither the context length nor the vocabulary may refuse it now."""
    ids, history = pack_ids([10**6] * 100), pack_ids([1, 2, 3])
    bench.submit(text=None, ids=ids, history=history)
    [(to, adds)] = bench.turn()
    assert to == ENGINE and (adds.items[0].ids, adds.items[0].history) == (ids, history)


def test_tokenize_and_detokenize_answer_their_frontend(bench: Bench) -> None:
    one, two, three = (bench.rids.next() for _ in range(3))
    bench.handle(TokenizeQuery(one, 3, 0, "The dog", None, False, True))
    bench.handle(TokenizeQuery(two, 3, 0, None, Chat(b'[{"role": "user", "content": "dog"}]'), False, False))
    ids = zoo.byte_level().encode("The dog</s>").ids
    bench.handle(DetokenizeQuery(three, 3, 0, pack_ids(ids)))
    sent = bench.finish()
    assert [to for to, _ in sent] == [FRONTEND] * 3
    first, second, third = (message for _, message in sent)
    assert first == TokenizeAnswer(one, pack_ids(zoo.byte_level().encode("The dog").ids), ["The", "Ġdog"])
    assert isinstance(second, TokenizeAnswer) and second.rid == two and second.strings is None
    assert third == DetokenizeAnswer(three, "The dog</s>")


# ---- failures ----------------------------------------------------------------------------------------------------

def test_each_failure_is_told_to_its_frontend_and_disturbs_nobody(bench: Bench) -> None:
    good = [bench.submit()]
    too_long = bench.submit(text=None, ids=pack_ids([5] * 64))
    empty = bench.submit(text="")
    broken = bench.submit(model=1)
    good.append(bench.submit())
    missing = bench.submit(model=9)
    odd = bench.submit(text=None, ids=b"\1\2\3")
    late = bench.submit(deadline_ns=1)
    bomb = bench.submit(text=None, chat=Chat(b'[{"role": "bomb", "content": "x"}]'))
    query = bench.rids.next()
    bench.handle(DetokenizeQuery(query, 3, 0, pack_ids([10**6])))
    good.append(bench.submit())
    sent = bench.finish()
    assert failures(sent) == [
        (too_long, "context_length_exceeded"), (empty, "invalid_value"), (broken, "internal_error"),
        (missing, "internal_error"), (odd, "internal_error"), (late, "timeout"), (bomb, "invalid_request"),
        (query, "invalid_value")]
    assert [rid for to, message in sent if to == ENGINE for rid in [message.items[0].rid]] == good


def test_what_users_wrote_is_never_logged(bench: Bench, caplog: pytest.LogCaptureFixture,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise ValueError("secret words of a user")
    monkeypatch.setattr("tokenizer_proc.prompt.PromptMaker.prompt_ids", explode)
    with caplog.at_level(logging.DEBUG):
        rid = bench.submit(text="secret words of a user")
        assert failures(bench.turn()) == [(rid, "internal_error")]
    assert f"{rid:x}" in caplog.text and "ValueError" in caplog.text and "secret" not in caplog.text


def test_a_failed_load_is_remembered_and_not_tried_again(bench: Bench) -> None:
    tried: list[str] = []
    inner = bench.worker._models._load

    def load(config: ModelConfig) -> TextModel:
        tried.append(config.path)
        return inner(config)
    bench.worker._models._load = load
    for _ in range(3):
        bench.submit(model=1)
    assert len(failures(bench.finish())) == 3 and len(tried) == 1


# ---- aborts and epochs -------------------------------------------------------------------------------------------

def test_aborted_work_is_never_done(bench: Bench) -> None:
    rids = [bench.submit(n=2) for _ in range(4)]
    bench.handle(Abort(pack_rids([rids[1], rids[2] + 1, bench.rids.next()]), 0))
    bench.handle(Abort(b"\1\2\3", 0))
    assert rids_of(bench.finish()) == [rids[0], rids[2], rids[3]]   # a child's abort leaves its siblings


def test_what_was_meant_for_a_predecessor_or_came_twice_is_dropped(bench: Bench) -> None:
    bench.submit(route=Route(4, 2, 2, 5, 0, 6))
    bench.handle(TokenizeQuery(bench.rids.next(), 2, 0, "x", None, False, False))
    rid = bench.submit()
    bench.submit(rid=rid)
    assert rids_of(bench.finish()) == [rid] and bench.dropped("old_epoch") == 2 and bench.dropped("twice") == 1


def test_messages_of_other_stages_are_bad_frames(bench: Bench) -> None:
    with pytest.raises(BadFrame):
        bench.handle(StopHit(1, 1))


def test_what_names_a_process_that_does_not_exist_is_a_bad_frame(bench: Bench) -> None:
    for wrong in ({"route": Route(4, 3, 60_000, 5, 0, 6)}, {"rid": RidMaker(2, 9).next()}):
        with pytest.raises(BadFrame):
            bench.submit(**wrong)  # type: ignore[arg-type]
    assert bench.turn() == []


def test_the_work_of_a_frontend_that_is_gone_is_dropped(bench: Bench) -> None:
    old, other = bench.submit(), RidMaker(0, 9).next()
    bench.submit(rid=other)
    new = RidMaker(1, 10).next()
    bench.submit(rid=new)
    bench.worker.peer_restarted(Kind.FRONTEND, 1, 10)
    bench.worker.assert_invariants()
    assert old not in (done := rids_of(bench.finish())) and done == [other, new]


def test_work_for_an_engine_that_is_gone_is_dropped(bench: Bench) -> None:
    bench.submit()
    new = bench.submit(route=Route(4, 3, 2, 6, 0, 6))
    elsewhere = bench.submit(route=Route(4, 3, 1, 1, 0, 6))
    bench.worker.peer_restarted(Kind.ENGINE, 2, 6)
    bench.worker.peer_restarted(Kind.DETOKENIZER, 0, 7)
    assert rids_of(bench.finish()) == [new, elsewhere]


# ---- back-pressure -----------------------------------------------------------------------------------------------

def test_what_an_engine_does_not_take_waits_in_order_while_others_are_served(bench: Bench) -> None:
    bench.sent.full = {ENGINE}
    waiting = [bench.submit(), bench.submit()]
    other = bench.submit(route=Route(4, 3, 0, 1, 0, 6))
    assert rids_of(bench.finish()) == [other]
    assert bench.worker.next_timer_ns() is not None and not bench.worker.has_work() and bench.worker.accepting()
    bench.sent.full = set()
    assert rids_of(bench.turn()) == waiting and bench.worker.next_timer_ns() is None


def test_aborts_and_deaths_also_reach_what_waits_to_be_sent(bench: Bench) -> None:
    bench.sent.full = {ENGINE}
    one, two, three = bench.submit(), bench.submit(), bench.submit(route=Route(4, 3, 2, 6, 0, 6))
    assert bench.finish() == []
    bench.handle(Abort(pack_rids([one]), 0))
    bench.worker.peer_restarted(Kind.ENGINE, 2, 6)
    bench.sent.full = set()
    assert rids_of(bench.turn()) == [three] and two not in rids_of(bench.finish())
    bench.sent.full = {FRONTEND}
    bench.submit(text="")
    assert bench.finish() == []
    bench.worker.peer_restarted(Kind.FRONTEND, 1, 10)
    bench.sent.full = set()
    assert bench.turn() == []


def test_a_stuck_engine_ends_work_and_reading_at_a_bound(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tokenizer_proc.worker.MAX_UNSENT", 3)
    bench.sent.full = {ENGINE}
    rids = [bench.submit() for _ in range(5)]
    bench.finish()
    assert bench.worker.load().waiting == 2 and not bench.worker.accepting() and not bench.worker.has_work()
    bench.sent.full = set()
    assert rids_of(bench.turn() + bench.finish()) == rids and bench.worker.accepting()


@pytest.mark.parametrize(("name", "value"), [("MAX_PENDING", 2), ("MAX_PENDING_BYTES", 1200)])
def test_waiting_work_is_bounded_by_number_and_by_bytes(
        bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    monkeypatch.setattr(f"tokenizer_proc.worker.{name}", value)
    bench.submit(text="a" * 90)
    assert bench.worker.accepting()
    bench.submit(text="a" * 90 + "b" * 30)
    assert not bench.worker.accepting()
    bench.turn()
    assert bench.worker.accepting()
