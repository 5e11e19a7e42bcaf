"""Every family computes what transformers computes with the same weights: greedy ids in float32, whatever the batch."""
from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engine_proc.tiny import BASE, Driver, Reference, load, make_checkpoint, prompts, sequence

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
Cases = Callable[[str], tuple[Path, list[list[int]], list[list[int]]]]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Cases:
    """name -> (checkpoint, prompts, transformers' greedy ids); made once, as the reference takes most of the time."""
    @functools.cache
    def make(name: str) -> tuple[Path, list[list[int]], list[list[int]]]:
        family, config = FAMILIES[name]
        directory = make_checkpoint(tmp_path_factory.mktemp("tiny") / name, family, **config)
        given, expected = map(list, zip(*Reference(directory).clear(LENGTHS, COUNT)))
        assert len({token for ids in expected for token in ids}) > 30, "a reference that repeats itself proves little"
        return directory, given, expected
    return make


@pytest.mark.parametrize("kernels", [False, True], ids=["torch", "kernels"])
@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_equal_those_of_transformers(name: str, kernels: bool, cases: Cases) -> None:
    directory, given, expected = cases(name)
    runner = load(directory, backend="own", kernels=kernels)

    alone = [Driver(runner).run(sequence(1, prompt, COUNT))[0] for prompt in given]
    together = Driver(runner, max_step_tokens=24, max_prefill_chunk=7).run(
        *(sequence(i, prompt, COUNT) for i, prompt in enumerate(given)))

    assert alone == expected
    assert together == expected


def test_longrope_uses_the_long_factors_when_it_serves_more_than_the_trained_length(tmp_path: Path) -> None:
    """transformers switches by the length of a text, we by what is served: equal beyond the trained length."""
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * HALF,
            "long_factor": [1.0 + i for i in range(HALF)]}
    directory = make_checkpoint(tmp_path / "m", "phi3", original_max_position_embeddings=32, rope_parameters=rope)
    given, expected = map(list, zip(*Reference(directory).clear((40, 70), 20)))
    assert Driver(load(directory)).run(*(sequence(i, prompt, 20) for i, prompt in enumerate(given))) == expected


@torch.inference_mode()
def test_the_language_model_of_a_multimodal_checkpoint_answers_texts(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(transformers.Gemma3Config(
        text_config={**BASE, **GEMMA, "sliding_window": 24, "num_hidden_layers": 7}, mm_tokens_per_image=4,
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 28, "patch_size": 14})).eval()
    model.get_input_embeddings().weight.mul_(0.1)
    model.save_pretrained(tmp_path / "m")
    (ids,) = prompts([50])
    (answer,) = Driver(load(tmp_path / "m", backend="own")).run(sequence(1, ids, 12))
    best = model(input_ids=torch.tensor([ids + answer])).logits[0, 49:-1].argmax(dim=-1)
    assert answer == best.tolist() and len(set(answer)) > 3
