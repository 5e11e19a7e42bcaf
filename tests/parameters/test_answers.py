"""Parameters that say what is computed of a prompt and how the answer looks: plain and streamed."""
from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.errors import QuartetError
from pipeline.messages import Kind
from tests.engine_proc.tiny import Reference
from tests.parameters.whole import Whole

PROMPT = "hello there"


def refused(whole: Whole, kind: str = "completions", **body: Any) -> QuartetError:
    with pytest.raises(QuartetError) as error:
        whole.ask(kind, **{"prompt": PROMPT, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, **body})
    assert error.value.status == 400
    return error.value


def texts(chunks: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for chunk in chunks for c in chunk["choices"] if c["index"] == index)


# ---- log-probabilities ----

def test_prompt_logprobs(whole: Whole, reference: Reference) -> None:
    ids = whole.encode(PROMPT)
    direct = reference.logprobs(ids)
    (choice,) = whole.complete(prompt_logprobs=2)["choices"]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(ids)
    for i, entry in enumerate(choice["prompt_logprobs"][1:]):
        own = entry[str(ids[i + 1])]
        assert own["logprob"] == pytest.approx(float(direct[i, ids[i + 1]]), abs=1e-4)
        assert own["rank"] == 1 + int((direct[i] > direct[i, ids[i + 1]]).sum())
        assert own["decoded_token"] == whole.decode([ids[i + 1]])
        best = direct[i].topk(2).indices.tolist()
        assert set(entry) == {str(ids[i + 1]), *map(str, best)}
    assert whole.complete(prompt_logprobs=0)["choices"][0]["prompt_logprobs"][1].keys() == {str(ids[1])}
    chat = whole.chat(prompt_logprobs=1, return_token_ids=True)
    assert len(chat["prompt_logprobs"]) == len(chat["prompt_token_ids"]) and chat["prompt_logprobs"][0] is None


def test_prompt_logprobs_in_a_stream(whole: Whole) -> None:
    """Those of the prompt's own tokens ride with the first chunk; alternatives are not streamed."""
    plain = whole.complete(prompt_logprobs=0)["choices"][0]["prompt_logprobs"]
    chunks = whole.stream("completions", prompt=PROMPT, max_tokens=4, temperature=0, prompt_logprobs=0)
    assert chunks[0]["choices"][0]["prompt_logprobs"] == plain
    assert all("prompt_logprobs" not in c["choices"][0] for c in chunks[1:])
    assert refused(whole, prompt_logprobs=1, stream=True).param == "prompt_logprobs"
    chunks = whole.stream("chat", messages=[{"role": "user", "content": "hi"}], max_tokens=4, prompt_logprobs=0)
    assert chunks[0]["prompt_logprobs"][0] is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_and_no_output(whole: Whole, reference: Reference, stream: bool) -> None:
    """`max_tokens: 0` scores a text: the prompt comes back with its log-probabilities, and nothing else."""
    body = {"prompt": PROMPT, "max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0}
    if stream:
        (choice,) = [c for chunk in whole.stream("completions", **body) for c in chunk["choices"]]
    else:
        answer = whole.ask("completions", **body)
        (choice,) = answer["choices"]
        assert answer["usage"]["completion_tokens"] == 0
    ids = whole.encode(PROMPT)
    direct = reference.logprobs(ids)
    told = choice["logprobs"]
    assert choice["text"] == PROMPT and choice["finish_reason"] == "length"
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:] == pytest.approx(direct[range(len(ids) - 1), ids[1:]].tolist(), abs=1e-4)
    assert told["text_offset"] == [PROMPT.index(t, i) for i, t in zip(told["text_offset"], told["tokens"])]


def test_echo_goes_ahead_of_the_output(whole: Whole) -> None:
    plain = whole.complete(logprobs=2)["choices"][0]
    (choice,) = whole.complete(echo=True, logprobs=2)["choices"]
    assert choice["text"] == PROMPT + plain["text"]
    assert choice["logprobs"]["tokens"][-8:] == plain["logprobs"]["tokens"]
    chunks = whole.stream("completions", prompt=PROMPT, echo=True, max_tokens=8, temperature=0)
    assert texts(chunks) == choice["text"]


def test_logprobs_of_ids_that_are_asked_for(whole: Whole, reference: Reference) -> None:
    asked = [100, 101, 100]
    answer = whole.complete(logprobs=1, logprob_token_ids=asked, return_tokens_as_token_ids=True, return_token_ids=True)
    (choice,) = answer["choices"]
    ids = choice["token_ids"]
    direct = reference.logprobs(whole.encode(PROMPT) + ids)[len(whole.encode(PROMPT)) - 1:]
    for i, entry in enumerate(choice["logprobs"]["top_logprobs"]):
        assert {"token_id:100", "token_id:101", f"token_id:{ids[i]}"} == set(entry)
        assert entry["token_id:101"] == pytest.approx(float(direct[i, 101]), abs=1e-4)
    chat = whole.chat(logprobs=True, top_logprobs=1, logprob_token_ids=[100], return_tokens_as_token_ids=True)
    for entry in chat["choices"][0]["logprobs"]["content"]:
        assert [t["token"] for t in entry["top_logprobs"]] == [entry["token"], "token_id:100"]
    assert refused(whole, logprob_token_ids=[5]).param == "logprob_token_ids"
    assert refused(whole, logprob_token_ids=[320], logprobs=1).param == "logprob_token_ids"


def test_the_whole_vocabulary(whole: Whole, reference: Reference) -> None:
    assert refused(whole, logprobs=-1).param == "logprobs"
    assert refused(whole, logprobs=21).param == "logprobs"
    whole.reconfigured(max_logprobs=-1)
    try:
        (choice,) = whole.complete(logprobs=-1, return_tokens_as_token_ids=True, max_tokens=2)["choices"]
        first = choice["logprobs"]["top_logprobs"][0]
        assert len(first) == 320 and math.isclose(sum(map(math.exp, first.values())), 1.0, rel_tol=1e-4)
        direct = reference.logprobs(whole.encode(PROMPT))[-1]
        assert all(value == pytest.approx(float(direct[int(name[9:])]), abs=1e-4) for name, value in first.items())
        told = whole.complete(prompt_logprobs=-1, max_tokens=1)["choices"][0]["prompt_logprobs"]
        assert all(len(entry) == 320 for entry in told[1:])
        assert len(whole.chat(logprobs=True, top_logprobs=-1)["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 320
        assert refused(whole, logprobs=321).param == "logprobs"
        assert refused(whole, logprobs=320, n=100, max_tokens=200).param == "logprobs"
    finally:
        whole.reconfigured(max_logprobs=20)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"])
def test_logprobs_modes(directory: Path, reference: Reference, mode: str) -> None:
    """What the four modes call log-probabilities, computed directly from transformers' logits."""
    other = Whole(directory, engine={"logprobs_mode": mode})
    prompt = other.encode(PROMPT)
    with torch.inference_mode():
        logits = reference.model(torch.tensor([prompt])).logits[0, -1].float()
    shown = logits.clone()
    if mode.startswith("processed"):
        shown[77] += 3.0
        shown /= 0.5
        shown[shown < shown.topk(5).values[-1]] = -math.inf
    if mode.endswith("logprobs"):
        shown = torch.log_softmax(shown, dim=-1)
    (choice,) = other.complete(
        logprobs=8, temperature=0.5, top_k=5, logit_bias={"77": 3.0}, max_tokens=1, seed=4,
        return_tokens_as_token_ids=True)["choices"]
    for name, value in choice["logprobs"]["top_logprobs"][0].items():
        wanted = float(shown[int(name.removeprefix("token_id:"))])
        assert value == (-9999.0 if wanted == -math.inf else pytest.approx(wanted, abs=1e-3))


def test_tokens_as_token_ids(whole: Whole) -> None:
    (choice,) = whole.complete(logprobs=0, return_token_ids=True, return_tokens_as_token_ids=True)["choices"]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    (choice,) = whole.chat(logprobs=True, return_token_ids=True, return_tokens_as_token_ids=True)["choices"]
    assert [t["token"] for t in choice["logprobs"]["content"]] == [f"token_id:{i}" for i in choice["token_ids"]]


# ---- ids and texts of prompts ----

@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_return_token_ids(whole: Whole, kind: str) -> None:
    body = {"prompt": PROMPT, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "temperature": 0,
            "return_token_ids": True}
    answer = whole.ask(kind, **body)
    (choice,) = answer["choices"]
    prompt = (answer if kind == "chat" else choice)["prompt_token_ids"]
    wanted = PROMPT if kind == "completions" else "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt == whole.encode(wanted) and len(choice["token_ids"]) == 5
    chunks = whole.stream(kind, **body)
    found = [i for chunk in chunks for c in chunk["choices"] for i in c.get("token_ids") or ()]
    assert found == choice["token_ids"]
    shown = [chunk if kind == "chat" else chunk["choices"][0] for chunk in chunks]
    assert shown[0]["prompt_token_ids"] == prompt and not any("prompt_token_ids" in c for c in shown[1:])


def test_return_prompt_text(whole: Whole) -> None:
    wanted = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    answer = whole.chat(return_prompt_text=True)
    assert answer["prompt_text"] == wanted
    assert wanted not in answer["choices"][0]["message"]["content"] and "prompt_text" not in whole.chat()
    chunks = whole.stream("chat", messages=[{"role": "user", "content": "hello"}], max_tokens=4, return_prompt_text=True)
    assert chunks[0]["prompt_text"] == wanted and not any("prompt_text" in c for c in chunks[1:])


def test_prompts_in_all_forms(whole: Whole) -> None:
    words = ["hello", "the quick brown"]
    answer = whole.ask("completions", prompt=words, max_tokens=4, temperature=0, n=2, return_token_ids=True)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    alone = [whole.ids(prompt=word, max_tokens=4) for word in words]
    assert [c["token_ids"] for c in answer["choices"]] == [alone[0], alone[0], alone[1], alone[1]]
    assert [c["prompt_token_ids"] for c in answer["choices"][::2]] == [whole.encode(word) for word in words]
    assert answer["usage"]["prompt_tokens"] == sum(len(whole.encode(word)) for word in words)
    ids = whole.ask("completions", prompt=[whole.encode(w) for w in words], max_tokens=4, temperature=0,
                    return_token_ids=True)
    assert [c["token_ids"] for c in ids["choices"]] == alone
    assert whole.ids(prompt=whole.encode(words[0]), max_tokens=4) == alone[0]
    chunks = whole.stream("completions", prompt=words, max_tokens=4, temperature=0)
    assert [texts(chunks, i) for i in (0, 1)] == [whole.decode(ids) for ids in alone]


def test_add_special_tokens(directory: Path, whole: Whole, tmp_path: Path) -> None:
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<s>", "add_bos_token": True}))
    other = Whole(tmp_path)
    begun = [other.complete(return_token_ids=True, **body)["choices"][0]["prompt_token_ids"]
             for body in ({}, {"add_special_tokens": False})]
    assert begun == [[other.id("<s>"), *other.encode(PROMPT)], other.encode(PROMPT)]


def test_truncation(whole: Whole) -> None:
    long = "the quick brown fox jumps over the lazy dog " * 3
    ids = whole.encode(long)

    def kept(**body: Any) -> list[int]:
        return list(whole.complete(prompt=long, return_token_ids=True, **body)["choices"][0]["prompt_token_ids"])
    assert kept() == ids
    assert kept(truncate_prompt_tokens=5) == kept(truncate_prompt_tokens=5, truncation_side="left") == ids[-5:]
    assert kept(truncate_prompt_tokens=5, truncation_side="right") == ids[:5]
    longer = long * 20
    (choice,) = whole.complete(prompt=longer, truncate_prompt_tokens=-1, max_tokens=1, return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == whole.encode(longer)[-255:]
    (choice,) = whole.complete(prompt=longer, truncate_prompt_tokens=-1, max_tokens=1, truncation_side="right",
                               return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == whole.encode(longer)[:255]
    assert refused(whole, prompt=longer).code == "context_length_exceeded"


def test_suffix(whole: Whole, directory: Path, tmp_path: Path) -> None:
    (choice,) = whole.complete(prompt="the quick", suffix=" dog", return_token_ids=True)["choices"]
    assert choice["prompt_token_ids"] == [
        whole.id("<|fim_prefix|>"), *whole.encode("the quick"), whole.id("<|fim_suffix|>"), *whole.encode(" dog"),
        whole.id("<|fim_middle|>")]
    assert choice["text"] == whole.decode(choice["token_ids"])
    assert whole.ids(prompt="the quick", suffix=" dog", kill=(Kind.ENGINE, 6)) == choice["token_ids"]
    for more in ({"echo": True}, {"truncate_prompt_tokens": 5}, {"prompt": [1, 2]}):
        assert refused(whole, suffix="x", **more).param == "suffix"
    for file in directory.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes().replace(b"fim_middle", b"fim_centre"))
    (plain,) = Whole(tmp_path).complete(prompt="the quick", suffix="", return_token_ids=True)["choices"]
    assert plain["prompt_token_ids"] == whole.encode("the quick")          # nothing that would have to follow
    error = refused(Whole(tmp_path), suffix="x")
    assert (error.code, error.param) == ("unsupported_parameter", "suffix")


# ---- what is chosen, and when it is told ----

def test_best_of(whole: Whole) -> None:
    body = {"temperature": 1.0, "seed": 7, "logprobs": 0, "max_tokens": 5}
    every = whole.complete(n=6, **body)["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / len(c["logprobs"]["token_logprobs"]) for c in every]
    ranked = sorted(range(6), key=lambda i: -means[i])
    answer = whole.complete(n=2, best_of=6, **body)
    assert [c["text"] for c in answer["choices"]] == [every[i]["text"] for i in ranked[:2]]
    assert [c["index"] for c in answer["choices"]] == [0, 1] and answer["usage"]["completion_tokens"] == 30
    del body["logprobs"]
    assert whole.complete(best_of=6, **body)["choices"][0]["logprobs"] is None
    assert refused(whole, best_of=2, n=3).param == "best_of"
    assert refused(whole, best_of=2, stream=True).param == "best_of"


def test_beam_search(whole: Whole, reference: Reference) -> None:
    answer = whole.complete(use_beam_search=True, n=3, return_token_ids=True, temperature=0, logprobs=1)
    found = [c["token_ids"] for c in answer["choices"]]
    from transformers import GenerationConfig
    prompt = torch.tensor([whole.encode(PROMPT)])
    with torch.inference_mode():
        out = reference.model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=GenerationConfig(
            num_beams=3, num_return_sequences=3, max_new_tokens=8, pad_token_id=0, eos_token_id=whole.id("</s>")))
    assert found == out[:, prompt.shape[1]:].tolist() and len({*map(tuple, found)}) == 3
    assert whole.ids(use_beam_search=True, best_of=3) == found[0] != whole.ids()
    for kind in (Kind.ENGINE, Kind.DETOKENIZER):
        again = whole.complete(kill=(kind, 5), use_beam_search=True, n=3, return_token_ids=True, logprobs=1)
        assert again["choices"] == answer["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / 8 for c in answer["choices"]]
    assert means == sorted(means, reverse=True)


def test_length_penalty_and_early_stopping(whole: Whole) -> None:
    """Each changes what is found (that it is transformers' answer: tests/engine_proc/test_beams.py)."""
    body = {"allowed_token_ids": [whole.id("</s>"), 77, 78, 79], "use_beam_search": True, "best_of": 4, "max_tokens": 16}

    def found(**more: Any) -> list[list[int]]:
        return [whole.ids(prompt=[i, 60], **body, **more) for i in range(80, 92)]
    short, plain, long = (found(length_penalty=penalty) for penalty in (-4.0, 1.0, 4.0))
    assert sum(map(len, short)) < sum(map(len, plain)) < sum(map(len, long))
    assert found(early_stopping=True, length_penalty=4.0) != long
    assert refused(whole, length_penalty=2).param == "length_penalty"
    assert refused(whole, early_stopping=True).param == "early_stopping"


def test_beam_search_refuses_what_it_cannot_honour(whole: Whole) -> None:
    for name, value in (("stream", True), ("temperature", 0.7), ("top_p", 0.5), ("top_k", 5), ("min_p", 0.1),
                        ("repetition_detection", {"max_pattern_size": 2, "min_count": 2}), ("n", 65)):
        error = refused(whole, use_beam_search=True, **{name: value})
        assert error.param == (name if name != "stream" else "use_beam_search")


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_stream_interval(whole: Whole, kind: str) -> None:
    body = {"prompt": PROMPT, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 11, "temperature": 0,
            "return_token_ids": True}

    def sizes(**more: Any) -> list[int]:
        return [len(c["token_ids"]) for chunk in whole.stream(kind, **body, **more) for c in chunk["choices"]
                if c.get("token_ids")]
    assert sizes() == [1] * 11
    assert sizes(stream_interval=4) == [1, 4, 4, 2]
    whole.reconfigured(stream_interval=5)
    try:
        assert sizes() == sizes(stream_interval=2) == [1, 5, 5] and sizes(stream_interval=10) == [1, 10]
    finally:
        whole.reconfigured(stream_interval=1)


def test_cache_salt(directory: Path) -> None:
    """Equal prompts share the cache under equal salts only."""
    other, prompt = Whole(directory), "the quick brown fox jumps over the lazy dog " * 4

    def cached(**body: Any) -> int:
        return int(other.complete(prompt=prompt, **body)["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached(cache_salt="a") == 0 < cached(cache_salt="a")
    assert cached(cache_salt="b") == 0 and cached() == 0 < cached()


def test_priority(directory: Path) -> None:
    """The lower number goes first where the server schedules by it; elsewhere it is refused."""
    other = Whole(directory, model={"engine": EngineConfig(
        scheduling_policy="priority", max_num_seqs=1, num_kv_blocks=100, threads=1)})
    requests = [other.open("completions", {"prompt": PROMPT, "max_tokens": 6, "priority": priority})[1]
                for priority in (0, 9, -9)]
    ended = []
    while not all(request.done for request in requests):
        other.pump()
        ended += [request for request in requests if request.done and request not in ended]
    assert ended.index(requests[2]) < ended.index(requests[1])
    assert refused(Whole(directory), priority=1).param == "priority"


def test_thinking_token_budget(directory: Path) -> None:
    """After so many tokens of reasoning the end tag comes, whoever opened the reasoning."""
    other = Whole(directory, model={"reasoning_parser": "think"})
    start, end = other.id("<think>"), other.id("</think>")
    inside: dict[str, Any] = {"prompt": "hello<think>", "max_tokens": 12, "logit_bias": {str(end): -100}}
    free = other.ids(**inside)
    assert end not in free
    for budget in (0, 3):
        bound = other.ids(thinking_token_budget=budget, **inside)
        assert bound[:budget] == free[:budget] and bound[budget] == end and bound.count(end) == 1
        assert other.ids(thinking_token_budget=budget, kill=(Kind.ENGINE, 7), **inside) == bound
    opens = {"prompt": "hello", "max_tokens": 10, "allowed_token_ids": [start, 77], "logit_bias": {str(start): 9}}
    bound = other.ids(thinking_token_budget=2, **opens)
    assert start in bound[:7] and bound[bound.index(start) + 3] == end
    assert other.ids(prompt="hello", max_tokens=6, thinking_token_budget=2) == other.ids(prompt="hello", max_tokens=6)
    assert other.ids(prompt="a<think>b</think>", max_tokens=6, thinking_token_budget=0) == other.ids(
        prompt="a<think>b</think>", max_tokens=6)
    assert other.ids(thinking_token_budget=-1, **inside) == free
    assert refused(Whole(directory), thinking_token_budget=5).param == "thinking_token_budget"


def test_include_usage(whole: Whole) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0, "allowed_token_ids": whole.letters}
    assert not any("usage" in chunk for chunk in whole.stream("completions", **body))
    chunks = whole.stream("completions", stream_options={"include_usage": True}, **body)
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == 3
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    chunks = whole.stream("completions", stream_options={"include_usage": True, "continuous_usage_stats": True}, **body)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[0] == 1 and counts[-1] == 3 and all(a <= b for a, b in pairwise(counts))


@pytest.mark.parametrize("name", ["vllm_xargs", "kv_transfer_params", "ec_transfer_params", "logits_processors",
                                  "watermarking"])
def test_what_only_other_systems_have_is_refused_by_name(whole: Whole, name: str) -> None:
    for kind in ("completions", "chat"):
        error = refused(whole, kind, **{name: {"a": 1}})
        assert (error.code, error.param) == ("unsupported_parameter", name)
