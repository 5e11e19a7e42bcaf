"""Prompts as embeddings: the same as their tokens, kept apart in the cache, refused where they make no sense."""
from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.messages import Kind
from tests.engine_proc.tiny import Driver, Reference, load, make_checkpoint, sequence
from tests.parameters.test_answers import PROMPT, refused
from tests.parameters.whole import Whole


def embeds_of(rows: torch.Tensor, dtype: str = "float32", **changes: Any) -> dict[str, Any]:
    data = rows.to(getattr(torch, dtype)).contiguous().view(torch.uint8).numpy().tobytes()
    return {"dtype": dtype, "shape": list(rows.shape), "data": base64.b64encode(data).decode(), **changes}


@pytest.fixture(scope="module")
def open_whole(directory: Path) -> Whole:
    return Whole(directory, http={"prompt_embeds": True})


def rows_for(reference: Reference, ids: list[int]) -> torch.Tensor:
    return reference.model.get_input_embeddings()(torch.tensor(ids)).detach()


def test_prompt_embeds_of_tokens_are_the_tokens(open_whole: Whole, reference: Reference) -> None:
    ids = open_whole.encode(PROMPT * 6)
    rows = rows_for(reference, ids)
    wanted = open_whole.ids(prompt=ids)
    body = {"prompt_embeds": embeds_of(rows), "max_tokens": 8, "temperature": 0, "return_token_ids": True}
    answer = open_whole.ask("completions", **body)
    (choice,) = answer["choices"]
    assert choice["token_ids"] == wanted and choice["prompt_token_ids"] is None
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert choice["text"] == open_whole.text(prompt=ids)
    chunks = open_whole.stream("completions", **body)
    assert [i for chunk in chunks for c in chunk["choices"] for i in c["token_ids"]] == wanted
    for kind in (Kind.TOKENIZER, Kind.ENGINE, Kind.DETOKENIZER):
        assert open_whole.ask("completions", kill=(kind, 6), **body)["choices"][0]["token_ids"] == wanted
    for dtype in ("float16", "bfloat16"):
        rounded = embeds_of(rows, dtype)
        again = open_whole.ask("completions", **{**body, "prompt_embeds": rounded})
        exact = embeds_of(rows.to(getattr(torch, dtype)).float())
        assert again["choices"] == open_whole.ask("completions", **{**body, "prompt_embeds": exact})["choices"]


def test_prompt_embeds_go_ahead_of_prompts(open_whole: Whole, reference: Reference) -> None:
    one, two = ([30, 40, 50], [60, 70])
    answer = open_whole.ask("completions", prompt="hello", temperature=0, max_tokens=4, return_token_ids=True,
                            prompt_embeds=[embeds_of(rows_for(reference, ids)) for ids in (one, two)])
    assert [c["token_ids"] for c in answer["choices"]] == [
        open_whole.ids(prompt=prompt, max_tokens=4) for prompt in (one, two, "hello")]


def test_prompt_embeds_share_the_cache_by_content_only(open_whole: Whole, reference: Reference) -> None:
    def cached(ids: list[int]) -> int:
        answer = open_whole.ask("completions", prompt_embeds=embeds_of(rows_for(reference, ids)), max_tokens=1)
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached([90] * 40) == 0 and cached([91] * 40) == 0 and cached([90] * 40) == 32
    assert open_whole.complete(prompt=[0] * 40)["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_prompt_embeds_that_are_refused(whole: Whole, open_whole: Whole, reference: Reference) -> None:
    rows = rows_for(reference, [30, 40])
    good = embeds_of(rows)
    assert refused(whole, prompt_embeds=good).code == "unsupported_parameter"
    nan = rows.clone()
    nan[0, 0] = math.nan
    for bad in ({**good, "dtype": "int32"}, {**good, "shape": [2]}, {**good, "shape": [0, 64]}, {**good, "data": "!!"},
                {**good, "shape": [3, 64]}, {**good, "shape": [2, 2**30]}, embeds_of(nan), embeds_of(nan, "bfloat16"),
                {"dtype": "float32", "shape": [2, 64]}, "AAAA", 5, embeds_of(rows[:, :32]),
                embeds_of(torch.zeros(256, 64))):
        error = refused(open_whole, prompt_embeds=bad)
        assert error.param is not None and error.param.startswith("prompt_embeds"), (bad, error)
    for name, value in (("echo", True), ("prompt_logprobs", 1), ("truncate_prompt_tokens", 5), ("suffix", "x"),
                        ("repetition_penalty", 1.5)):
        assert refused(open_whole, prompt_embeds=good, **{name: value}).param == name


@pytest.mark.parametrize("family, engine", [
    ("gemma", {"kernels": False}), ("gemma", {}), ("granite", {}), ("granite", {"backend": "transformers"}),
    ("gemma", {"backend": "transformers"})])
def test_prompt_embeds_are_what_transformers_takes(tmp_path: Path, family: str, engine: dict[str, Any]) -> None:
    """Whatever a family does to its embeddings: `inputs_embeds` of transformers give the same text."""
    more = {"embedding_multiplier": 3.0, "logits_scaling": 2.0} if family == "granite" else {"head_dim": 16}
    directory = make_checkpoint(tmp_path / family, family, num_hidden_layers=2, **more)
    reference = Reference(directory)
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(5)) * (8.0 if family == "gemma" else 1.0)
    with torch.no_grad():
        wanted = reference.model.generate(inputs_embeds=rows[None], attention_mask=torch.ones(1, 9).long(),
                                          do_sample=False, max_new_tokens=6)[0].tolist()
    runner = load(directory, **engine)
    seq = sequence(1, [0] * 9, 6)
    seq.embeds = rows.numpy()
    assert Driver(runner).run(seq) == [wanted]
