"""Every family computes what transformers computes with the same weights: greedy ids in float32, whatever the batch."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine_proc.tiny import Driver, Reference, load, make_checkpoint, sequence

HALF = 8        # rotary pairs of the tiny heads
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 24}
# name -> (model type, configuration over the tiny one)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3-rope": ("llama", {"tie_word_embeddings": True, "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
    "mistral-window": ("mistral", {"sliding_window": 20}),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "gemma": ("gemma", {"head_dim": 24}),
    "gemma2": ("gemma2", {**GEMMA, "sliding_window": 24, "attn_logit_softcapping": 5.0,
                          "final_logit_softcapping": 4.0}),
    "gemma3": ("gemma3_text", {**GEMMA, "sliding_window": 24, "num_hidden_layers": 7}),
    "phi3": ("phi3", {"sliding_window": 30}),
    "phi3-longrope-short": ("phi3", {
        "original_max_position_embeddings": 512, "max_position_embeddings": 2048, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0 + i / 10 for i in range(HALF)],
            "long_factor": [1.0 + i for i in range(HALF)]}}),
    "phi3-partial": ("phi3", {"rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
    "smollm3": ("smollm3", {"use_sliding_window": True, "sliding_window": 24}),
    "granite": ("granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2,
                            "logits_scaling": 2.0}),
    "olmo2": ("olmo2", {}),
    "olmo3": ("olmo3", {"sliding_window": 24}),
    "starcoder2": ("starcoder2", {"sliding_window": 24}),
}
LENGTHS = (1, 40, 90)
COUNT = 40


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    family, config = FAMILIES[name]
    directory = make_checkpoint(tmp_path / "m", family, **config)
    runner, reference = load(directory, backend="own"), Reference(directory)
    given, expected = map(list, zip(*reference.clear(LENGTHS, COUNT)))

    alone = [Driver(runner).run(sequence(1, prompt, COUNT))[0] for prompt in given]
    together = Driver(runner, max_step_tokens=24, max_prefill_chunk=7).run(
        *(sequence(i, prompt, COUNT) for i, prompt in enumerate(given)))

    assert len({token for ids in expected for token in ids}) > 30, "a reference that repeats itself proves little"
    assert alone == expected
    assert together == expected
