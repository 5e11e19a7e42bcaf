"""Parameters that say which tokens may come, and when a choice ends: each changes what is generated, as it says."""
from __future__ import annotations

from typing import Any

import pytest
import torch

from pipeline.errors import QuartetError
from pipeline.messages import Kind
from tests.engine_proc.tiny import Reference
from tests.parameters.whole import Whole


def refused(whole: Whole, **body: Any) -> QuartetError:
    with pytest.raises(QuartetError) as error:
        whole.complete(**body)
    assert error.value.status == 400
    return error.value


def test_allowed_token_ids(whole: Whole) -> None:
    free = whole.ids()
    allowed = [i for i in range(100, 140) if i not in free]
    assert set(whole.ids(allowed_token_ids=allowed)) <= set(allowed)
    assert set(whole.ids(allowed_token_ids=allowed, temperature=1.5, seed=1)) <= set(allowed)
    assert whole.ids(allowed_token_ids=[77]) == [77] * 8
    assert whole.ids(allowed_token_ids=list(range(320))) == free


def test_neighbours_in_a_batch_are_left_alone(whole: Whole) -> None:
    free, table = whole.ids(), whole.stages[Kind.FRONTEND, 0][0]
    bodies: list[dict[str, Any]] = [
        {}, {"allowed_token_ids": [77]}, {"bad_words": [whole.decode([77])]}, {"frequency_penalty": 2}, {"logprobs": 3},
        {"use_beam_search": True, "best_of": 3}, {"temperature": 1.0, "seed": 1, "top_k": 3}]
    requests = [whole.open("completions", {"prompt": "hello there", "max_tokens": 8, "temperature": 0, **body})[1]
                for body in bodies]
    while not all(request.done for request in requests):
        whole.pump()
    together = [list(request.choices[0].ids) for request in requests]
    for request in requests:
        table.close(request)
    assert together[0] == free and together[1] == [77] * 8
    assert together == [whole.ids(**body) for body in bodies]


def test_bad_words_of_one_token(whole: Whole) -> None:
    free = whole.ids(max_tokens=4, allowed_token_ids=whole.letters)
    bound = whole.ids(max_tokens=4, allowed_token_ids=whole.letters, bad_words=[whole.decode(free[:1])])
    assert free[0] not in bound


def test_bad_words_of_several_tokens(whole: Whole) -> None:
    """The word's beginning may come, its end may not follow it; elsewhere it may."""
    first, second = whole.encode("zq")
    body: dict[str, Any] = {"allowed_token_ids": [first, second], "max_tokens": 60, "temperature": 2.0, "seed": 3}
    free, bound = whole.ids(**body), whole.ids(bad_words=["zq"], **body)
    assert (first, second) in set(zip(free, free[1:]))
    assert (first, second) not in set(zip(bound, bound[1:])) and {first, second} == set(bound)
    assert whole.ids(logit_bias={str(first): 50, str(second): 60}, bad_words=["zq"], max_tokens=2)[:1] == [second]


def test_bad_words_after_a_space(whole: Whole) -> None:
    """"the" is one token at the start of a text and another after a space: both are banned."""
    ids = [whole.encode(text) for text in ("the", " the")]
    assert len(ids[1]) == 1 and ids[0] != ids[1]
    assert whole.ids(logit_bias={str(ids[1][0]): 100}, max_tokens=3) == ids[1] * 3
    assert ids[1][0] not in whole.ids(logit_bias={str(ids[1][0]): 100}, max_tokens=3, bad_words=["the"])


def test_what_leaves_no_token_is_an_error(whole: Whole) -> None:
    assert refused(whole, allowed_token_ids=[77], bad_words=[whole.decode([77])]).code == "no_token_left"
    assert whole.text() == whole.text()


@pytest.mark.parametrize("kind", [Kind.ENGINE, Kind.DETOKENIZER, Kind.TOKENIZER])
def test_state_in_the_sampler_survives_a_death(whole: Whole, kind: Kind) -> None:
    """Bans, penalties and watches are rebuilt from the history."""
    first, second = whole.encode("zq")
    body = {"allowed_token_ids": [first, second, 80, 81], "bad_words": ["zq"], "temperature": 1.0, "seed": 5,
            "max_tokens": 30, "frequency_penalty": 0.5,
            "repetition_detection": {"max_pattern_size": 4, "min_count": 6}}
    wanted = whole.ids(**body)
    assert whole.ids(kill=(kind, 12), **body) == wanted


def test_repetition_detection(whole: Whole) -> None:
    loop = {"allowed_token_ids": [77], "max_tokens": 30}
    rule = {"max_pattern_size": 3, "min_count": 5}
    (choice,) = whole.complete(repetition_detection=rule, **loop)["choices"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("repetition", "repetition_detected")
    assert choice["text"] == whole.decode([77] * 5)
    assert len(whole.ids(repetition_detection={**rule, "min_pattern_size": 2}, **loop)) == 10
    assert len(whole.ids(repetition_detection={**rule, "max_pattern_size": 0}, **loop)) == 30
    assert len(whole.ids(repetition_detection=rule, min_tokens=9, **loop)) == 10
    chunks = whole.stream("completions", prompt="hello", temperature=0, repetition_detection=rule, **loop)
    assert chunks[-1]["choices"][0]["finish_reason"] == "repetition"


def test_min_tokens_and_stop_token_ids(whole: Whole) -> None:
    free = whole.ids(max_tokens=12)
    stop = free[3]
    assert stop not in free[:3]
    (choice,) = whole.complete(stop_token_ids=[stop], return_token_ids=True)["choices"]
    assert choice["token_ids"] == free[:4] and (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == whole.decode(free[:3])
    later = whole.ids(stop_token_ids=[stop], min_tokens=6, max_tokens=12)
    assert stop not in later[:6] and len(later) > 6


def test_include_stop_str_in_output(whole: Whole) -> None:
    body = {"max_tokens": 12, "allowed_token_ids": whole.letters}
    free = whole.text(**body)
    stop = free[4:6]
    cut = free.index(stop)
    (choice,) = whole.complete(stop=stop, **body)["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (free[:cut], "stop", stop)
    assert whole.text(stop=[stop], include_stop_str_in_output=True, **body) == free[:cut + 2]


def test_ignore_eos(whole: Whole) -> None:
    eos = {str(whole.id("</s>")): 100}
    (choice,) = whole.complete(logit_bias=eos)["choices"]
    assert choice["finish_reason"] == "stop" and choice["text"] == ""
    (choice,) = whole.complete(logit_bias=eos, ignore_eos=True)["choices"]
    assert choice["finish_reason"] == "length"


def test_special_tokens_in_the_text(whole: Whole) -> None:
    ids = [whole.id("<think>"), whole.id("</think>")]
    body = {"allowed_token_ids": ids, "max_tokens": 3}
    assert whole.text(**body) == ""
    shown = whole.text(skip_special_tokens=False, **body)
    assert "think>" in shown and shown == whole.decode(whole.ids(**body), special=True)


def test_logit_bias(whole: Whole) -> None:
    assert whole.ids(logit_bias={"99": 100}) == [99] * 8
    free = whole.ids(max_tokens=1)
    assert whole.ids(logit_bias={str(free[0]): -100}, max_tokens=1) != free


def test_seed_and_temperature(whole: Whole) -> None:
    drawn = [whole.ids(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert whole.ids(temperature=1.0, seed=1, top_k=1) == whole.ids() == whole.ids(temperature=1.0, seed=1, top_p=1e-9)
    assert whole.ids(temperature=1.0, seed=1, min_p=1.0) == whole.ids()


@pytest.mark.parametrize("name, value", [
    ("presence_penalty", 1.5), ("frequency_penalty", 0.7), ("repetition_penalty", 1.4)])
def test_penalties(whole: Whole, reference: Reference, name: str, value: float) -> None:
    """As computed directly from transformers' logits; presence and frequency count the output only."""
    prompt, allowed = whole.encode("hello there"), list(range(70, 90))

    def direct(penalty: float) -> list[int]:
        output: list[int] = []
        for _ in range(20):
            with torch.no_grad():
                logits = reference.model(torch.tensor([prompt + output])).logits[0, -1].float()
            for token in set(prompt + output if name == "repetition_penalty" else output):
                here = logits[token]
                logits[token] = ((here / penalty if here > 0 else here * penalty) if name == "repetition_penalty"
                                 else here - penalty * (output.count(token) if name == "frequency_penalty" else 1))
            output.append(max(allowed, key=lambda token: float(logits[token])))
        return output
    body = {"allowed_token_ids": allowed, "max_tokens": 20}
    assert whole.ids(**body, **{name: value}) == direct(value) != whole.ids(**body)
