"""The embedded default model: prepared from its GGUF file, it answers as transformers does with the same weights."""
from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tests.engine_proc.tiny import Driver, Reference, load, sequence

TEXTS = ["What is the capital of France?", "Write a short poem about the sea and the wind in autumn.",
         "List three colours.", "In 1969, the first"]
COUNT = 20


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


def test_float32_equals_transformers(smollm2: Path, prompts: list[list[int]]) -> None:
    reference, runner = Reference(smollm2), load(smollm2, 512, dtype="float32")
    expected = [reference.greedy(prompt, COUNT) for prompt in prompts]
    together = Driver(runner, max_prefill_chunk=7).run(*(sequence(i, p, COUNT) for i, p in enumerate(prompts)))
    assert together == expected


def test_bfloat16_differs_first_at_a_near_tie(smollm2: Path, prompts: list[list[int]]) -> None:
    reference, runner = Reference(smollm2, torch.bfloat16), load(smollm2, 512)
    assert runner.facts["dtype"] == "bfloat16"
    answers = Driver(runner).run(*(sequence(i, p, COUNT) for i, p in enumerate(prompts)))
    for prompt, answer in zip(prompts, answers):
        expected = reference.greedy(prompt, COUNT)
        first = next((i for i, pair in enumerate(zip(expected, answer)) if pair[0] != pair[1]), None)
        if first is not None:
            best = reference.logprobs(prompt + expected[:first])[-1].topk(2).values
            assert float(best[0] - best[1]) < 0.05, f"answers part at token {first}"
