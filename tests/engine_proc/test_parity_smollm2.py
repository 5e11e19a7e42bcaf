"""The embedded default model: prepared from its GGUF file, it answers as transformers does with the same weights."""
from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.engine_proc.tiny import Driver, Reference, load, sequence

TEXTS = ["What is the capital of France?", "Write a short poem about the sea and the wind in autumn.",
         "List three colours.", "In 1969, the first", "Once upon a time"]
COUNT = 24


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    chat = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    return [tokenizer.encode(chat.format(text) if i < 2 else text).ids for i, text in enumerate(TEXTS)]


def test_it_names_the_capital_of_france_and_stops(smollm2: Path) -> None:
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    ids = tokenizer.encode(f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nWhat is the capital of France?"
                           "<|im_end|>\n<|im_start|>assistant\n").ids
    (answer,) = Driver(load(smollm2, 512)).run(sequence(1, ids, 30, stops=[2]))
    assert tokenizer.decode(answer) == "The capital of France is Paris."
    assert answer[-1] == tokenizer.token_to_id("<|im_end|>")


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2)


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: list[list[int]]) -> list[list[int]]:
    return [reference.greedy(prompt, COUNT) for prompt in prompts]


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_float32_equals_transformers(smollm2: Path, prompts: list[list[int]], expected: list[list[int]],
                                     kernels: bool) -> None:
    runner = load(smollm2, 512, dtype="float32", kernels=kernels)
    together = Driver(runner, max_prefill_chunk=7).run(*(sequence(i, p, COUNT) for i, p in enumerate(prompts)))
    assert together == expected


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
def test_bfloat16_differs_first_at_a_near_tie(smollm2: Path, prompts: list[list[int]], expected: list[list[int]],
                                              reference: Reference, kernels: bool) -> None:
    """The reference is transformers in float32 on the same weights. In bfloat16 transformers rounds its logits to
    steps of 0.125, so that it parts from its own second run there; the torch path rounds likewise, the kernels do not.
    """
    runner = load(smollm2, 512, kernels=kernels)
    assert runner.facts["dtype"] == "bfloat16"
    near = 0.05 if runner.facts["arithmetic"] == "kernels" else 0.2
    answers = Driver(runner).run(*(sequence(i, p, COUNT) for i, p in enumerate(prompts)))
    for prompt, answer, ids in zip(prompts, answers, expected):
        first = next((i for i, pair in enumerate(zip(ids, answer)) if pair[0] != pair[1]), None)
        if first is not None:
            best = reference.logprobs(prompt + ids[:first])[-1].topk(2).values
            assert float(best[0] - best[1]) < near, f"answers part at token {first}"
