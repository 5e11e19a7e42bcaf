"""The speech engine on tiny random models: the same ids as transformers, and the life of a recording in the core."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    LogitsProcessorList,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    WhisperTimeStampLogitsProcessor,
)

from pipeline.messages import Abort, Kind, Transcribed, pack_ids, pack_rids
from tests.engine_proc.speech_tiny import (
    EOT,
    FIRST_TIME,
    POSITIONS,
    SOT,
    World,
    features,
    ids_of,
    make_moonshine,
    make_whisper,
    samples,
)

WINDOWS = [features(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_whisper(tmp_path_factory.mktemp("speech") / "whisper")


@pytest.fixture(scope="module")
def world(whisper: Path) -> World:
    return World(whisper)


@pytest.fixture(scope="module")
def reference(whisper: Path) -> transformers.WhisperForConditionalGeneration:
    return transformers.WhisperForConditionalGeneration.from_pretrained(whisper, dtype=torch.float32).eval()


@torch.no_grad()
def generated(model: transformers.WhisperForConditionalGeneration, window: np.ndarray, *, language: str = "en",
              task: str = "transcribe", previous: Sequence[int] = (), timestamps: bool = False) -> list[int]:
    """What transformers' model and logits processors make of a window, greedily: output ids without the end.

    Not its `generate`, which goes back to the last timestamp of a window and hears the rest again.
    """
    states = model.get_encoder()(torch.from_numpy(window)[None])
    ids = [*previous, SOT, {"en": SOT + 1, "de": SOT + 2}[language], {"translate": SOT + 3, "transcribe": SOT + 4}[task]]
    ids += [] if timestamps else [FIRST_TIME - 1]
    begin, settings = len(ids), model.generation_config
    rules = LogitsProcessorList([SuppressTokensAtBeginLogitsProcessor(settings.begin_suppress_tokens, begin),
                                 SuppressTokensLogitsProcessor(settings.suppress_tokens)])
    if timestamps:
        rules.append(WhisperTimeStampLogitsProcessor(settings, begin))
    while len(ids) < POSITIONS:
        tokens = torch.tensor([ids])
        logits = model(encoder_outputs=states, decoder_input_ids=tokens).logits[:, -1].float()
        ids.append(int(rules(tokens, logits).argmax()))
        if ids[-1] == EOT:
            return ids[begin:-1]
    return ids[begin:]


@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "torch"])
def test_greedy_ids_are_those_of_transformers(whisper: Path, reference, kernels: bool) -> None:
    world = World(whisper, kernels=kernels)
    rid = world.add(WINDOWS)
    world.run()
    found = world.results(rid)
    heard = [ids_of(found[i]) for i in range(len(WINDOWS))]
    assert heard == [generated(reference, window) for window in WINDOWS]
    assert len({tuple(ids) for ids in heard}) == len(WINDOWS), "every window says something else"
    assert world.at_rest()


def test_ids_with_timestamps_are_those_of_transformers(world: World, reference) -> None:
    rid = world.add(WINDOWS, timestamps=True)
    world.run()
    for index, window in enumerate(WINDOWS):
        wanted = generated(reference, window, timestamps=True)
        text = [i for i in ids_of(world.results(rid)[index]) if i < EOT]
        assert text and text == [i for i in wanted if i < EOT]
        for segment in world.results(rid)[index].segments:
            assert 30.0 * index <= segment.start_s <= segment.end_s <= 30.0 * (index + 1)


@pytest.mark.parametrize("task", ["transcribe", "translate"])
def test_the_language_is_the_one_that_transformers_detects(world: World, reference, task: str) -> None:
    for window in WINDOWS[:2]:
        rid = world.add([window, WINDOWS[3]], language=None, task=task)
        world.run()
        token = int(reference.detect_language(torch.from_numpy(window)[None])[0])
        code = {SOT + 1: "en", SOT + 2: "de"}[token]
        found = world.results(rid)
        assert [found[i].language for i in (0, 1)] == [code, code], "the first window speaks for all"
        assert ids_of(found[1]) == generated(reference, WINDOWS[3], language=code, task=task)


def test_a_window_does_not_depend_on_its_company(world: World) -> None:
    alone = []
    for window in WINDOWS:
        rid = world.add([window])
        world.run()
        alone.append(ids_of(world.results(rid)[0]))
    rids = [world.add(WINDOWS[i:] + WINDOWS[:i]) for i in range(4)]
    world.run()
    for i, rid in enumerate(rids):
        assert [ids_of(world.results(rid)[k]) for k in range(4)] == alone[i:] + alone[:i]


def test_a_prompt_is_what_was_said_before(world: World, reference) -> None:
    rid = world.add(WINDOWS[:1], prompt="abc")
    world.run()
    previous = [SOT + 5, *world.runner.vocabulary.encode("abc")]
    assert ids_of(world.results(rid)[0]) == generated(reference, WINDOWS[0], previous=previous)


def test_unlikely_texts_are_tried_again_hotter_and_the_likeliest_is_kept(world: World) -> None:
    ladder = [0.0, 0.4, 1.0]
    rid = world.add(WINDOWS, temperatures=ladder)
    again = world.add(WINDOWS, temperatures=ladder)
    world.run()
    first, second = world.results(rid), world.results(again)
    assert any(segment.temperature > 0 or segment.avg_logprob < -1 for m in first.values() for segment in m.segments)
    assert [ids_of(first[i]) for i in range(4)] == [ids_of(second[i]) for i in range(4)], "drawn by window, not by chance"


def test_word_times_rise_within_their_window(world: World) -> None:
    rid = world.add(WINDOWS, words=True, timestamps=True)
    world.run()
    found = world.results(rid)
    for index, message in found.items():
        words = [word for segment in message.segments for word in segment.words]
        assert words and all(0.0 <= word.probability <= 1.0 for word in words)
        times = [time for word in words for time in (word.start_s, word.end_s)]
        assert 30.0 * index <= min(times) and max(times) <= 30.0 * (index + 1) + 0.02
        assert all(word.start_s <= word.end_s for word in words)
        starts = [word.start_s for word in words]
        assert starts == sorted(starts)


def test_a_successor_computes_what_is_missing_and_the_same(whisper: Path, world: World) -> None:
    rid = world.add(WINDOWS, temperatures=[0.0, 1.0])
    world.run()
    whole = world.results(rid)
    other = World(whisper)
    rid = other.add(WINDOWS, done=pack_ids([0, 2]), only=[1, 3], temperatures=[0.0, 1.0])
    other.run()
    rest = other.results(rid)
    assert sorted(rest) == [1, 3]
    assert all(ids_of(rest[i]) == ids_of(whole[i]) for i in rest)
    assert other.at_rest()


@pytest.mark.parametrize("turns", [0, 1, 2, 5])
def test_an_aborted_recording_leaves_nothing_behind(world: World, turns: int) -> None:
    rid = world.add(WINDOWS)
    neighbour = world.add(WINDOWS[:1])
    world.run(turns)
    world.core.handle(Abort(pack_rids([rid]), 0))
    world.core.assert_invariants()
    world.run()
    assert world.at_rest() and 0 in world.results(neighbour) and not world.failures()
    before = len(world.sender.sent)
    world.core.handle(Abort(pack_rids([rid]), 0))
    world.run()
    assert len(world.sender.sent) == before


def test_an_abort_may_overtake_its_windows(world: World) -> None:
    ahead = world._rids.next() + 256
    world.core.handle(Abort(pack_rids([ahead]), 0))
    assert world.add(WINDOWS) == ahead
    world.run()
    assert world.at_rest() and not world.results(ahead)


def test_the_deadline_ends_a_recording_by_name(whisper: Path) -> None:
    world = World(whisper)
    rid = world.add(WINDOWS, deadline_ns=world.now + 10)
    world.run(2)
    world.now += 11
    world.run()
    assert world.failures() == [(rid, "timeout")] and world.at_rest()


def test_recordings_of_a_frontend_that_is_gone_are_dropped(whisper: Path) -> None:
    world = World(whisper)
    world.add(WINDOWS)
    world.run(2)
    world.core.peer_restarted(Kind.FRONTEND, 0, 2)
    world.run()
    assert world.at_rest() and not [m for m in world.sender.sent if isinstance(m, Transcribed)]


def test_what_a_model_cannot_do_is_refused_by_name(world: World) -> None:
    for asked, code in (({"language": "fr"}, "invalid_value"), ({"task": "dance"}, "invalid_value"),
                        ({"temperatures": [float("nan")]}, "invalid_value")):
        rid = world.add(WINDOWS[:1], **asked)
        assert (rid, code) in world.refusals()
    rid = world.add([np.zeros((80, 100), np.float32)])
    assert (rid, "invalid_value") in world.refusals()
    assert world.at_rest()


def test_a_window_that_cannot_be_encoded_fails_its_own_recording(whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(whisper)
    encode = world.runner.encode

    def broken(windows: list) -> None:
        if windows[0].given.index == 2:
            raise RuntimeError("boom")
        encode(windows)

    monkeypatch.setattr(world.runner, "encode", broken)
    bad, good = world.add(WINDOWS), world.add(WINDOWS[:2])
    world.run()
    assert world.failures() == [(bad, "internal_error")] and sorted(world.results(good)) == [0, 1] and world.at_rest()


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_windows_that_are_encoded_side_by_side_are_heard_as_alone(whisper: Path, quantization: str | None) -> None:
    both, alone = (World(whisper, threads=threads, quantization=quantization) for threads in (2, 1))
    assert (both.runner.num_lanes, alone.runner.num_lanes) == (2, 1)
    rids = [[world.add([features(i)]) for i in range(5)] for world in (both, alone)]
    for world in (both, alone):
        world.run()
        assert world.at_rest()
    assert [ids_of(both.results(r)[0]) for r in rids[0]] == [ids_of(alone.results(r)[0]) for r in rids[1]]


def test_of_windows_encoded_side_by_side_only_the_one_that_cannot_be_fails(
        whisper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(whisper, threads=2)
    encode, first, second = world.runner.net.encode, features(1), features(2)

    def broken(slots: list[int], inputs: list[np.ndarray]) -> None:
        if any(data is first for data in inputs):
            raise RuntimeError("no")
        encode(slots, inputs)
    monkeypatch.setattr(world.runner.net, "encode", broken)
    bad, good = world.add([first]), world.add([second])
    world.run()
    assert [rid for rid, _ in world.failures()] == [bad] and world.results(good) and world.at_rest()


def test_more_windows_than_slots_take_turns_and_early_ones_go_first(whisper: Path) -> None:
    world = World(whisper, max_num_seqs=2)
    long, short = world.add(WINDOWS * 3), world.add(WINDOWS[:1])
    world.run()
    order = [(m.rid, m.index) for m in world.sender.sent if isinstance(m, Transcribed)]
    assert len(order) == 13 and world.at_rest()
    assert order.index((short, 0)) < order.index((long, 4))


def test_moonshine_says_what_transformers_says(tmp_path: Path) -> None:
    directory = make_moonshine(tmp_path / "moonshine")
    reference = transformers.MoonshineForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    world, sounds = World(directory), [samples(seed, 1 + seed) for seed in range(3)]
    rid = world.add(sounds)
    world.run()
    found = world.results(rid)
    for index, sound in enumerate(sounds):
        wanted = reference.generate(input_values=torch.from_numpy(sound)[None], max_length=40, do_sample=False)[0].tolist()[1:]
        assert ids_of(found[index]) == [i for i in wanted if i != 256]
    assert world.at_rest()
