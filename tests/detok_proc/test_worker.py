"""The detokenizer's tables: opening, closing, stops, replay, deaths, refusals, and what each frontend is sent."""
from __future__ import annotations

import random
import struct
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from detok_proc.stream import ByteText
from detok_proc.vocab import Vocab
from detok_proc.worker import DetokWorker, Vocabs
from pipeline import codec
from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import StartError
from pipeline.ids import RidMaker
from pipeline.messages import (
    TEXT_ROW,
    TOKEN_ROW,
    Abort,
    Deltas,
    Failed,
    Finish,
    Kind,
    Logprobs,
    Open,
    StepOut,
    StopHit,
    TextDelta,
    TokenOut,
    Usage,
    pack_ids,
    unpack_ids,
)
from pipeline.params import DetokSpec
from pipeline.schema import BadFrame
from pipeline.transport import Address
from tests import rows
from tests.detok_proc import zoo

BYTE_LEVEL = Vocab(zoo.byte_level(), zoo.special_ids(zoo.byte_level()))
FALLBACK = Vocab(zoo.byte_fallback(), zoo.special_ids(zoo.byte_fallback()))
EOS = zoo.token(zoo.byte_level(), "</s>")
RIDS = RidMaker(0, 1)


def ids_of(text: str, vocab: Vocab = BYTE_LEVEL) -> list[int]:
    return vocab.tokenizer.encode(text, add_special_tokens=False).ids


class Sent:
    """A scripted sender: keeps what it takes, refuses the addresses in `full`."""

    def __init__(self) -> None:
        self.messages: list[tuple[Address, Any]] = []
        self.full: set[Address] = set()
        self.lies = False                     # say that there is room, then refuse

    def send(self, to: Address, message: Any) -> bool:
        if to in self.full:
            return False
        self.messages.append((to, codec.decode(codec.encode(message))))
        return True

    def pressure(self, to: Address) -> float:
        return 1.0 if to in self.full and not self.lies else 0.0

    def take(self, kind: type) -> list[tuple[Address, Any]]:
        found = [entry for entry in self.messages if isinstance(entry[1], kind)]
        self.messages = [entry for entry in self.messages if not isinstance(entry[1], kind)]
        return found

    def deltas(self, frontend: int = 0) -> list[TextDelta]:
        return [item for to, message in self.take(Deltas) if to == Address(Kind.FRONTEND, frontend)
                for item in rows.deltas(message)]


class Bench:
    """One worker (index 2, epoch 5) with an engine (index 1, epoch 7) in front of it."""

    def __init__(self, vocab: Vocab = BYTE_LEVEL) -> None:
        config = ServerConfig(run_dir="", log_dir="", frontends=4, models=(
            ModelConfig(names=("m",), path="m", replicas=8), ModelConfig(names=("broken",), path="broken")))

        def load(path: str) -> Vocab:
            if path == "broken":
                raise StartError(3, "There is no tokenizer.json in broken.")
            return vocab
        self.sent, self.registry = Sent(), CollectorRegistry()
        self.worker = DetokWorker(config, 2, 5, self.sent, self.registry, Vocabs(config, load))

    def step(self, *items: TokenOut, opens: list[Open] | None = None, engine: int = 1, engine_epoch: int = 7,
             detok_epoch: int = 5) -> None:
        message = StepOut(engine, engine_epoch, detok_epoch, opens or [], list(items))
        self.worker.handle(codec.decode(codec.encode(rows.step(message))))
        self.worker.assert_invariants()

    def turn(self) -> list[TextDelta]:
        self.worker.turn()
        self.worker.assert_invariants()
        return self.sent.deltas()

    def open(self, rid: int, spec: DetokSpec | None = None, left: list[int] | None = None,
             history: list[int] | None = None) -> None:
        self.step(opens=[Open(rid, spec or DetokSpec(), pack_ids(left or []), pack_ids(history or []))])

    def metric(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(name, labels) or 0.0

    @property
    def open_choices(self) -> float:
        return self.metric("quartet:detok_choices")


def out(rid: int, start: int, ids: list[int], finish: Finish = Finish.RUNNING, **more: Any) -> TokenOut:
    return TokenOut(rid, start, pack_ids(ids), finish, **more)


# ---- plain streaming ---------------------------------------------------------------------------------------------

def test_ids_become_deltas_with_contiguous_offsets_and_the_finish_closes_the_entry() -> None:
    bench, rid, ids = Bench(), RIDS.next(), ids_of("The dog sleeps 😀.")
    bench.open(rid)
    assert bench.open_choices == 1 and bench.turn() == []
    text, usage = "", Usage(3, 1, len(ids))
    for n, number in enumerate(ids):
        last = n == len(ids) - 1
        bench.step(out(rid, n, [number], Finish.LENGTH if last else Finish.RUNNING, usage=usage if last else None))
        [delta] = bench.turn()
        assert (delta.offset, delta.start, list(unpack_ids(delta.ids))) == (len(text), n, [number])
        text += delta.text
    assert text == "The dog sleeps 😀." and delta.finish == Finish.LENGTH and delta.usage == usage
    assert bench.open_choices == 0
    assert bench.metric("quartet:detok_tokens_total") == len(ids)


def test_what_one_turn_gathers_is_one_delta_per_choice_and_one_message_per_frontend() -> None:
    bench = Bench()
    mine, twin, other = RIDS.next(), RIDS.next(), RidMaker(3, 1).next()
    for rid in (mine, twin, other):
        bench.open(rid)
    a, b = ids_of("ab"), ids_of("The dog")
    bench.step(out(mine, 0, b[:1]), out(other, 0, a), out(twin, 0, b[:1]))
    bench.step(out(mine, 1, b[1:]))
    bench.worker.turn()
    messages = {to.index: message for to, message in bench.sent.take(Deltas)}
    assert {to: [(d.rid, d.text, d.start) for d in rows.deltas(m)] for to, m in messages.items()} == {
        0: [(mine, "The dog", 0), (twin, "The", 0)], 3: [(other, "ab", 0)]}
    assert (messages[0].detok, messages[0].detok_epoch) == (2, 5)


def test_ids_whose_text_is_held_back_are_sent_all_the_same() -> None:
    bench, rid = Bench(FALLBACK), RIDS.next()
    bench.open(rid)
    data = [zoo.token(FALLBACK.tokenizer, zoo.BYTES[byte]) for byte in "é".encode()]
    bench.step(out(rid, 0, data[:1]))
    assert [(d.text, d.ids) for d in bench.turn()] == [("", pack_ids(data[:1]))]
    bench.step(out(rid, 1, data[1:]))
    assert [(d.text, d.offset, d.start) for d in bench.turn()] == [("é", 0, 1)]


def test_a_character_that_stays_incomplete_is_flushed_at_the_finish() -> None:
    bench, rid = Bench(FALLBACK), RIDS.next()
    bench.open(rid)
    bench.step(out(rid, 0, [zoo.token(FALLBACK.tokenizer, "<0xF0>")], Finish.LENGTH))
    assert [d.text for d in bench.turn()] == ["\ufffd"]


@pytest.mark.parametrize(("finish", "skip", "include", "shown"), [
    (Finish.EOS, True, False, "dog"), (Finish.EOS, False, False, "dog"), (Finish.EOS, True, True, "dog"),
    (Finish.EOS, False, True, "dog</s>"), (Finish.STOP_ID, True, False, "dog"),
    (Finish.STOP_ID, False, True, "dog</s>"), (Finish.LENGTH, False, False, "dog</s>"),
    (Finish.LENGTH, True, False, "dog"),
])
def test_the_token_that_ends_a_choice_is_text_only_when_asked_for(
        finish: Finish, skip: bool, include: bool, shown: str) -> None:
    bench, rid, ids = Bench(), RIDS.next(), [*ids_of("dog"), EOS]
    bench.open(rid, DetokSpec(skip_special=skip, include_stop=include))
    bench.step(out(rid, 0, ids, finish, stop_id=EOS if finish == Finish.STOP_ID else None))
    [delta] = bench.turn()
    assert (delta.text, delta.finish, delta.ids) == (shown, finish, pack_ids(ids))
    assert delta.stop == (EOS if finish == Finish.STOP_ID else None)


def test_an_ordinary_stop_id_is_left_out_unless_included() -> None:
    for include, shown in ((False, "The"), (True, "The dog")):
        bench, rid, ids = Bench(), RIDS.next(), ids_of("The dog")
        bench.open(rid, DetokSpec(include_stop=include))
        for n, number in enumerate(ids[:-1]):
            bench.step(out(rid, n, [number]))
        bench.step(out(rid, len(ids) - 1, ids[-1:], Finish.STOP_ID, stop_id=ids[-1]))
        assert "".join(d.text for d in bench.turn()) == shown


@pytest.mark.parametrize("finish", [Finish.ABORT, Finish.ERROR])
def test_closings_that_the_frontend_knows_of_are_silent(finish: Finish) -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid)
    bench.step(out(rid, 0, ids_of("dog")), out(rid, len(ids_of("dog")), [], finish))
    assert bench.turn() == [] and bench.open_choices == 0


# ---- logprobs and echo -------------------------------------------------------------------------------------------

def logprobs(ids: list[int], k: int) -> Logprobs:
    n = len(ids)
    return Logprobs(k, struct.pack(f"<{n}f", *[-i for i in range(n)]), pack_ids([1] * n),
                    pack_ids([i for i in ids for _ in range(k)]), struct.pack(f"<{n * k}f", *[0.0] * (n * k)))


def test_logprobs_carry_the_bytes_of_their_tokens_and_are_merged_with_the_ids() -> None:
    bench, rid = Bench(FALLBACK), RIDS.next()
    ids = [zoo.token(FALLBACK.tokenizer, token) for token in ("▁", "<0xC3>", "</s>")]
    bench.open(rid)
    for n, number in enumerate(ids):
        bench.step(out(rid, n, [number], logprobs=logprobs([number], 2)))
    [delta] = bench.turn()
    assert delta.logprobs is not None
    assert delta.logprobs.tokens == [b" ", b"\xc3", b"</s>"]
    assert delta.logprobs.top_tokens == [b" "] * 2 + [b"\xc3"] * 2 + [b"</s>"] * 2
    assert delta.logprobs.values == struct.pack("<3f", 0, 0, 0) and len(delta.logprobs.top_ids) == 24
    assert bench.turn() == []


def test_echo_sends_the_prompts_text_and_names_its_logprobs_once() -> None:
    bench, rid = Bench(), RIDS.next()
    prompt, output = ids_of("The quick"), ids_of(" fox")
    bench.open(rid, DetokSpec(echo=True), left=prompt)
    bench.step(out(rid, 0, output[:1], prompt_logprobs=logprobs(prompt, 1)))
    bench.step(out(rid, 1, output[1:], Finish.LENGTH))
    [delta] = bench.turn()
    assert (delta.prompt_text, delta.text, delta.offset) == ("The quick", " fox", 0)
    assert delta.prompt_logprobs is not None and b"".join(delta.prompt_logprobs.tokens) == b"The quick"


def test_prompt_logprobs_that_come_in_chunks_name_the_right_tokens() -> None:
    bench, rid, prompt = Bench(), RIDS.next(), ids_of("The quick brown fox")
    bench.open(rid, left=prompt)
    bench.step(out(rid, 0, [], prompt_logprobs=logprobs(prompt[:2], 0)))
    bench.step(out(rid, 0, [], prompt_logprobs=logprobs(prompt[2:], 0)))
    [delta] = bench.turn()
    assert delta.prompt_logprobs is not None
    assert b"".join(delta.prompt_logprobs.tokens) == b"The quick brown fox" and delta.prompt_text is None


def test_echo_without_generation_is_the_prompt_alone() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid, DetokSpec(echo=True), left=ids_of("The dog"))
    bench.step(out(rid, 0, [], Finish.LENGTH, usage=Usage(2, 0, 0)))
    [delta] = bench.turn()
    assert (delta.prompt_text, delta.text, delta.ids, delta.finish) == ("The dog", "", b"", Finish.LENGTH)


# ---- stop strings ------------------------------------------------------------------------------------------------

def stopped_at(bench: Bench, rid: int, ids: list[int]) -> tuple[str, TextDelta]:
    """Feed one id a turn until the text ends; (all text, last delta)."""
    text = ""
    for n, number in enumerate(ids):
        bench.step(out(rid, n, [number], usage=Usage(9, 4, 1) if n == 0 else None, logprobs=logprobs([number], 1)))
        for delta in bench.turn():
            assert delta.offset == len(text)
            text += delta.text
            if delta.finish:
                return text, delta
    raise AssertionError("no stop")


def test_a_stop_string_ends_the_stream_at_once_and_tells_the_engine() -> None:
    bench, rid = Bench(), RIDS.next()
    ids = ids_of("The dog.\nUser: more text")
    bench.open(rid, DetokSpec(stop=["\nUser:"]))
    text, last = stopped_at(bench, rid, ids)
    count = last.start + len(last.ids) // 4
    assert text == "The dog." and (last.finish, last.stop) == (Finish.STOP_STRING, "\nUser:")
    assert last.usage == Usage(9, 4, count)
    assert BYTE_LEVEL.tokenizer.decode(ids[:count]).endswith(":") and last.logprobs is not None
    assert len(last.logprobs.tokens) == len(last.ids) // 4
    assert bench.sent.take(StopHit) == [(Address(Kind.ENGINE, 1, "ctl"), StopHit(rid, count))]


def test_a_stopped_entry_ignores_surplus_tokens_and_is_deleted_by_the_engines_closing_record() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid, DetokSpec(stop=["dog"]))
    bench.step(out(rid, 0, ids_of("dog")))
    bench.turn()
    assert bench.open_choices == 1
    bench.step(out(rid, len(ids_of("dog")), ids_of("surplus")))
    assert bench.turn() == []
    bench.step(out(rid, 99, [], Finish.STOP_STRING))
    assert bench.turn() == [] and bench.open_choices == 0


def test_a_stop_string_in_the_closing_record_needs_no_word_to_the_engine() -> None:
    bench, rid, ids = Bench(), RIDS.next(), ids_of("The dog sleeps")
    bench.open(rid, DetokSpec(stop=["dog"]))
    bench.step(out(rid, 0, ids, Finish.LENGTH, usage=Usage(5, 0, len(ids))))
    [delta] = bench.turn()
    assert (delta.text, delta.finish, delta.stop) == ("The ", Finish.STOP_STRING, "dog")
    assert bench.sent.take(StopHit) == [] and bench.open_choices == 0


def test_min_tokens_lets_early_stop_strings_pass() -> None:
    ids = [zoo.token(BYTE_LEVEL.tokenizer, c) for c in "ab.cd.ef."]
    for least, shown in ((0, "ab"), (2, "ab"), (3, "ab.cd"), (5, "ab.cd"), (6, "ab.cd.ef")):
        bench, rid = Bench(), RIDS.next()
        bench.open(rid, DetokSpec(stop=["."], min_tokens=least))
        assert stopped_at(bench, rid, ids)[0] == shown


def test_the_stop_string_is_kept_when_asked_and_nothing_after_it() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid, DetokSpec(stop=["do"], include_stop=True))
    assert stopped_at(bench, rid, ids_of("The dog"))[0] == "The do"


def test_held_back_text_is_released_at_the_finish() -> None:
    bench, rid, ids = Bench(), RIDS.next(), ids_of("The dog")
    bench.open(rid, DetokSpec(stop=[" dog!"]))
    bench.step(out(rid, 0, ids))
    assert [d.text for d in bench.turn()] == ["The"]
    bench.step(out(rid, len(ids), [EOS], Finish.EOS))
    assert [(d.text, d.offset) for d in bench.turn()] == [(" dog", 3)]


# ---- replay ------------------------------------------------------------------------------------------------------

REPLAYED = "Größe 日本語 😀👍🏽 The dog.\nUse the dog.\nUser"


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 200), st.lists(st.integers(1, 5), min_size=1, max_size=8),
       st.sampled_from([DetokSpec(), DetokSpec(stop=["\nUser:", "dog!"]), DetokSpec(stop=["dog"], min_tokens=20)]),
       st.sampled_from([BYTE_LEVEL, FALLBACK]))
def test_replay_with_history_goes_on_exactly_where_the_undisturbed_run_was(
        cut: int, steps: list[int], spec: DetokSpec, vocab: Vocab) -> None:
    ids = [*ids_of(REPLAYED, vocab), 10, 11]
    cut %= len(ids)
    whole = Bench(vocab)
    rid = RIDS.next()
    whole.open(rid, spec, left=[5, 6])
    expected: list[TextDelta] = []
    for n, number in enumerate(ids):
        whole.step(out(rid, n, [number], Finish.LENGTH if n == len(ids) - 1 else Finish.RUNNING))
        expected += whole.turn()
    if cut >= len(expected):
        return                                # the text had ended before: there is nothing to resume
    resumed = Bench(vocab)
    resumed.open(rid, spec, left=[5, 6], history=ids[:cut])
    position, number, after = cut, 0, []
    while position < len(ids):
        size = steps[number % len(steps)]
        last = position + size >= len(ids)
        resumed.step(out(rid, position, ids[position:position + size], Finish.LENGTH if last else Finish.RUNNING))
        after += resumed.turn()
        position, number = position + size, number + 1
    before = expected[:cut]
    assert after[0].offset == sum(len(d.text) for d in before) and after[0].start == cut
    assert "".join(d.text for d in after) == "".join(d.text for d in expected[cut:])
    assert b"".join(d.ids for d in after) == b"".join(d.ids for d in expected[cut:])
    assert (after[-1].finish, after[-1].stop) == (expected[-1].finish, expected[-1].stop)


def test_a_stop_string_that_the_history_holds_already_is_told_again() -> None:
    bench, rid, ids = Bench(), RIDS.next(), ids_of("The dog sleeps")
    bench.open(rid, DetokSpec(stop=["dog"]), history=ids)
    [delta] = bench.turn()
    assert (delta.offset, delta.text, delta.finish, delta.stop) == (4, "", Finish.STOP_STRING, "dog")
    [(to, hit)] = bench.sent.take(StopHit)
    assert to == Address(Kind.ENGINE, 1, "ctl") and hit.n_tokens == delta.start <= len(ids)


def test_a_continuation_does_not_echo_the_prompt_again() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid, DetokSpec(echo=True), left=ids_of("The"), history=ids_of(" dog"))
    bench.step(out(rid, len(ids_of(" dog")), ids_of("!")))
    assert [(d.prompt_text, d.text, d.offset) for d in bench.turn()] == [(None, "!", 4)]


# ---- gaps, duplicates, epochs ------------------------------------------------------------------------------------

def test_missing_ids_end_the_choice_as_a_lost_stage() -> None:
    bench, rid, neighbour = Bench(), RIDS.next(), RIDS.next()
    bench.open(rid)
    bench.open(neighbour)
    bench.step(out(rid, 1, ids_of("dog")), out(neighbour, 0, ids_of("dog")))
    assert [(d.rid, d.text) for d in bench.turn()] == [(neighbour, "dog")]
    [(to, failed)] = bench.sent.take(Failed)
    assert to == Address(Kind.FRONTEND, 0) and (failed.kind, failed.index, failed.epoch) == (Kind.DETOKENIZER, 2, 5)
    assert [(item.rid, item.code) for item in failed.items] == [(rid, "engine_unavailable")]
    assert bench.open_choices == 1


def test_ids_that_came_twice_are_taken_once() -> None:
    bench, rid, ids = Bench(), RIDS.next(), ids_of("The quick dog")
    bench.open(rid)
    bench.step(out(rid, 0, ids[:2]), out(rid, 0, ids[:2]), out(rid, 1, ids[1:], logprobs=logprobs(ids[1:], 0)))
    [delta] = bench.turn()
    assert delta.text == "The quick dog" and list(unpack_ids(delta.ids)) == ids
    assert delta.logprobs is not None and len(delta.logprobs.values) == 4 * len(ids[2:])


def test_an_entry_that_is_opened_twice_stays_the_first() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.open(rid)
    bench.step(out(rid, 0, ids_of("dog")))
    bench.open(rid)
    bench.step(out(rid, len(ids_of("dog")), ids_of("!")))
    assert [d.text for d in bench.turn()] == ["dog!"] and bench.metric(
        "quartet:detok_dropped_total", reason="opened_twice") == 1


def test_what_was_meant_for_a_predecessor_or_came_from_one_is_dropped() -> None:
    bench, rid = Bench(), RIDS.next()
    bench.step(opens=[Open(rid, DetokSpec(), b"", b"")], detok_epoch=4)
    bench.worker.peer_restarted(Kind.ENGINE, 1, 7)
    bench.open(RIDS.next())
    bench.step(opens=[Open(rid, DetokSpec(), b"", b"")], engine_epoch=6)
    assert bench.open_choices == 1 and bench.metric("quartet:detok_dropped_total", reason="old_epoch") == 2


def test_a_beacon_of_a_new_engine_epoch_drops_the_choices_of_the_old_one() -> None:
    bench, rid, other = Bench(), RIDS.next(), RIDS.next()
    bench.open(rid)
    bench.step(opens=[Open(other, DetokSpec(), b"", b"")], engine=0, engine_epoch=1)
    bench.step(out(rid, 0, ids_of("dog")))
    bench.worker.peer_restarted(Kind.ENGINE, 1, 8)
    bench.worker.peer_restarted(Kind.ENGINE, 1, 7)         # an old beacon changes nothing
    assert bench.turn() == [] and bench.open_choices == 1
    bench.step(out(other, 0, ids_of("dog")), engine=0, engine_epoch=1)
    assert [d.text for d in bench.turn()] == ["dog"]


def test_a_step_of_a_newer_engine_than_its_beacon_told_is_taken_and_kills_nobody() -> None:
    bench, old, new = Bench(), RIDS.next(), RIDS.next()
    bench.worker.peer_restarted(Kind.ENGINE, 1, 7)
    bench.open(old)
    bench.step(out(new, 0, ids_of("cat")), opens=[Open(new, DetokSpec(), b"", b"")], engine_epoch=8)
    bench.step(out(old, 0, ids_of("dog")))
    assert [d.text for d in bench.turn()] == ["cat", "dog"]
    bench.worker.peer_restarted(Kind.ENGINE, 1, 8)         # now the old one is known to be gone
    assert bench.open_choices == 1


def test_steps_of_no_engine_and_choices_of_no_frontend_are_refused() -> None:
    bench = Bench()
    with pytest.raises(BadFrame):
        bench.step(opens=[Open(RIDS.next(), DetokSpec(), b"", b"")], engine=60_000, engine_epoch=1)
    bench.step(opens=[Open(RidMaker(127, 1).next(), DetokSpec(), b"", b"")])
    assert bench.open_choices == 0 and bench.metric("quartet:detok_dropped_total", reason="misrouted") == 1


def test_a_new_frontend_epoch_drops_its_choices_and_their_output() -> None:
    bench, old, new, other = Bench(), RidMaker(0, 1).next(), RidMaker(0, 2).next(), RidMaker(1, 1).next()
    for rid in (old, new, other):
        bench.open(rid)
        bench.step(out(rid, 0, ids_of("dog")))
    bench.worker.peer_restarted(Kind.FRONTEND, 0, 2)
    bench.worker.assert_invariants()
    assert [d.rid for d in bench.turn()] == [new] and bench.open_choices == 2
    bench.step(out(old, 1, ids_of("dog")))
    assert bench.turn() == []


def test_unknown_ids_are_counted_and_ignored_and_messages_of_other_stages_are_bad_frames() -> None:
    bench = Bench()
    bench.step(out(RIDS.next(), 0, ids_of("dog")))
    with pytest.raises(BadFrame):
        bench.worker.handle(Abort(b"", 0))
    assert bench.turn() == [] and bench.sent.messages == []
    assert bench.metric("quartet:detok_dropped_total", reason="unknown") == 1


# ---- refusals and failures ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("lies", [False, True])
def test_output_that_a_frontend_does_not_take_waits_merged(lies: bool) -> None:
    bench, rid, other = Bench(), RIDS.next(), RidMaker(1, 1).next()
    bench.sent.full, bench.sent.lies = {Address(Kind.FRONTEND, 0)}, lies
    bench.open(rid, DetokSpec(stop=["!"]))
    bench.open(other)
    ids = ids_of("The quick brown fox!")
    for n, number in enumerate(ids):
        bench.step(out(rid, n, [number], usage=Usage(1, 0, 1) if n == 0 else None), out(other, n, [number]))
        bench.worker.turn()
        assert len(bench.sent.deltas(1)) == 1              # the neighbour's frontend is served
    assert bench.worker.next_timer_ns() is not None and not bench.worker.has_work()
    bench.step(out(rid, len(ids), [], Finish.STOP_STRING))  # the engine closes; the last delta still waits
    bench.sent.full = set()
    [delta] = bench.turn()
    assert (delta.text, delta.offset, delta.start, delta.finish) == ("The quick brown fox", 0, 0, Finish.STOP_STRING)
    assert delta.usage == Usage(1, 0, len(ids)) and list(unpack_ids(delta.ids)) == ids
    assert bench.turn() == [] and bench.worker.next_timer_ns() is None


def test_a_stop_and_a_failure_that_are_refused_are_sent_later() -> None:
    bench, rid, broken = Bench(), RIDS.next(), RIDS.next()
    bench.sent.full = {Address(Kind.ENGINE, 1, "ctl"), Address(Kind.FRONTEND, 0)}
    bench.open(rid, DetokSpec(stop=["dog"]))
    bench.step(out(rid, 0, ids_of("dog")))
    bench.open(broken, DetokSpec(model=1))
    bench.worker.turn()
    assert bench.sent.messages == []
    bench.sent.full = set()
    bench.worker.turn()
    assert [m.rid for _, m in bench.sent.take(StopHit)] == [rid]
    assert [i.rid for _, m in bench.sent.take(Failed) for i in m.items] == [broken]


@pytest.mark.parametrize(("spec", "ids"), [
    (DetokSpec(model=1), b""),                # its tokenizer cannot be loaded
    (DetokSpec(model=200), b""),              # there is no such model
    (DetokSpec(), b"\x01\x02\x03"),           # no whole ids
])
def test_one_choice_that_fails_does_not_disturb_its_neighbours(spec: DetokSpec, ids: bytes) -> None:
    bench, rid, neighbour = Bench(), RIDS.next(), RIDS.next()
    bench.open(rid, spec)
    bench.open(neighbour)
    bench.step(TokenOut(rid, 0, ids), out(neighbour, 0, ids_of("dog")))
    assert [(d.rid, d.text) for d in bench.turn()] == [(neighbour, "dog")]
    [(_, failed)] = bench.sent.take(Failed)
    assert [(item.rid, item.code) for item in failed.items] == [(rid, "internal_error")]
    assert bench.open_choices == 1


def test_a_row_that_cannot_be_decoded_ends_its_choice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, rid, neighbour, [number] = Bench(), RIDS.next(), RIDS.next(), ids_of("dog")[:1]
    bench.open(rid)
    bench.open(neighbour)

    def refuse(self: ByteText, number: int) -> str:
        raise ValueError("no such id")
    with monkeypatch.context() as patch:
        patch.setattr(ByteText, "push", refuse)
        bench.step(out(rid, 0, [number]))
    bench.step(out(rid, 1, [number]), out(neighbour, 0, [number]))
    assert [(d.rid, d.ids) for d in bench.turn()] == [(neighbour, pack_ids([number]))]
    [(_, failed)] = bench.sent.take(Failed)
    assert [(item.rid, item.code) for item in failed.items] == [(rid, "internal_error")]
    assert bench.open_choices == 1 and bench.metric("quartet:detok_dropped_total", reason="unknown") == 1


def test_half_a_row_is_a_bad_frame_of_which_nothing_is_taken() -> None:
    bench, rid = Bench(), RIDS.next()
    whole = TOKEN_ROW.pack(rid, 0, 5)
    with pytest.raises(BadFrame):
        bench.worker.handle(StepOut(1, 7, 5, [Open(rid, DetokSpec(), b"", b"")], [], whole + whole[:-1]))
    assert bench.turn() == [] and bench.open_choices == 0


@pytest.mark.parametrize("spec", [DetokSpec(), DetokSpec(stop=["never"])])
def test_text_and_ids_alone_travel_as_rows_and_what_has_more_to_tell_as_a_delta(spec: DetokSpec) -> None:
    bench, plain, ended = Bench(), RIDS.next(), RIDS.next()
    bench.open(plain, spec)
    bench.open(ended, spec)
    bench.step(out(plain, 0, ids_of("dog")), out(ended, 0, ids_of("dog"), Finish.LENGTH))
    bench.worker.turn()
    [(_, message)] = bench.sent.take(Deltas)
    assert [item.rid for item in message.items] == [ended] and message.text == "dog"
    assert [*TEXT_ROW.iter_unpack(message.rows)] == [(plain, 0, 0, len(ids_of("dog")), 3)]


def test_large_output_is_split_into_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("detok_proc.worker.MAX_DELTAS_BYTES", 200)
    bench, rids = Bench(), [RIDS.next() for _ in range(5)]
    for rid in rids:
        bench.open(rid, DetokSpec(echo=True), left=ids_of("The"))
    bench.step(*[out(rid, 0, ids_of("dog")) for rid in rids])
    bench.worker.turn()
    messages = bench.sent.take(Deltas)
    assert len(messages) == 3 and [d.rid for _, m in messages for d in rows.deltas(m)] == rids


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32))
def test_random_interleavings_leave_no_entry_and_give_whole_texts(seed: int) -> None:
    """Tokens of many choices in any order and grouping, refusals in between: whole texts, one finish each."""
    bench, chance = Bench(), random.Random(seed)
    texts = {RIDS.next(): chance.choice([REPLAYED, "The dog sleeps", "😀", ""]) for _ in range(6)}
    queues = {rid: [*ids_of(text), EOS] for rid, text in texts.items()}
    position, got, finished = dict.fromkeys(texts, -1), dict.fromkeys(texts, ""), []
    while any(p < len(queues[rid]) for rid, p in position.items()):
        for rid in chance.sample(list(texts), 3):
            start = position[rid]
            if start < 0:
                bench.open(rid)
                position[rid] = 0
            elif start < len(queues[rid]):
                size = chance.randint(1, 4)
                part = queues[rid][start:start + size]
                done = start + size >= len(queues[rid])
                bench.step(out(rid, start, part, Finish.EOS if done else Finish.RUNNING))
                position[rid] = start + size
        bench.sent.full = {Address(Kind.FRONTEND, 0)} if chance.random() < 0.4 else set()
        for delta in bench.turn():
            assert delta.offset == len(got[delta.rid])
            got[delta.rid] += delta.text
            finished += [delta.rid] if delta.finish else []
    bench.sent.full = set()
    for delta in bench.turn():
        got[delta.rid] += delta.text
        finished += [delta.rid] if delta.finish else []
    assert got == texts and sorted(finished) == sorted(texts) and bench.open_choices == 0
