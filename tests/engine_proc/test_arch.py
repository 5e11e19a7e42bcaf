"""What is read from config.json: both forms that transformers writes, defaults, and what is refused by name."""
from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from engine_proc.arch import FAMILIES, describe
from engine_proc.loader import refuse_unsupported
from engine_proc.rope import Rope, Unfit, frequencies
from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD

SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6,
                         "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 4096}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
LONG = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
# (model type, what both forms share, the 4.x form, the 5.x form)
FORMS = [
    ("llama", {}, {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"},
     {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "dtype": "bfloat16"}),
    ("llama", {}, {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
     {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    ("llama", {}, {"rope_scaling": {"type": "linear", "factor": 2.0}},
     {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
    ("qwen2", {}, {"use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 2, "rope_theta": 1e6},
     {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 6,
      "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    ("qwen3", {"head_dim": 32}, {"use_sliding_window": True, "sliding_window": 128, "max_window_layers": 4},
     {"use_sliding_window": True, "sliding_window": 128,
      "layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 2}),
    ("mistral", {"sliding_window": None}, {"rope_theta": 1e6}, {"rope_parameters": {"rope_theta": 1e6}}),
    ("gemma2", {"head_dim": 16, "sliding_window": 64}, {"hidden_activation": "gelu_pytorch_tanh"},
     {"layer_types": ["sliding_attention", "full_attention"] * 3}),
    ("gemma3_text", {"head_dim": 16, "sliding_window": 64},
     {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6,
      "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
     {"layer_types": ["sliding_attention"] * 5 + ["full_attention"], "rope_parameters": {
         "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
         "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}}),
    ("phi3", {"original_max_position_embeddings": 1024}, {"rope_scaling": {"type": "longrope", **LONG}},
     {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0, **LONG,
                          "original_max_position_embeddings": 1024}}),
    ("smollm3", {}, {"rope_theta": 5e6, "no_rope_layer_interval": 4},
     {"no_rope_layers": [1, 1, 1, 0, 1, 1], "rope_parameters": {"rope_type": "default", "rope_theta": 5e6}}),
]


@pytest.mark.parametrize("name, shared, old, new", FORMS, ids=[f"{form[0]}-{i}" for i, form in enumerate(FORMS)])
def test_old_and_new_forms_describe_the_same_model(name: str, shared: dict[str, Any], old: dict[str, Any],
                                                   new: dict[str, Any]) -> None:
    config = {"model_type": name, **SMALL, **shared}
    assert describe({**config, **old}) == describe({**config, **new})


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_a_file_omits_have_the_defaults_of_transformers(name: str) -> None:
    complete = transformers.AutoConfig.for_model(name, **SMALL).to_dict()
    assert describe({"model_type": name, **SMALL}) == describe(complete)


def test_windows_and_ropes_go_by_layer() -> None:
    arch = describe({"model_type": "gemma3_text", **SMALL, "head_dim": 16, "sliding_window": 64})
    assert [layer.window for layer in arch.layers] == [64] * 5 + [None]
    assert [arch.ropes[layer.rope or 0].theta for layer in arch.layers] == [1e4] * 5 + [1e6]
    nope = describe({"model_type": "smollm3", **SMALL})
    assert [layer.rope for layer in nope.layers] == [0, 0, 0, None, 0, 0]


@pytest.mark.parametrize("change, why", [
    ({"model_type": "bloom"}, "no description"), ({"hidden_act": "relu6"}, "activation"),
    ({"rope_scaling": {"rope_type": "spiral"}}, "rope type"),
    ({"layer_types": ["chunked_attention"] * 6}, "layer types"),
    ({"num_hidden_layers": "six"}, "does not read"), ({"hidden_size": None}, "does not read"),
    ({"rope_scaling": {"rope_type": "llama3"}}, "does not read"),
])
def test_what_does_not_fit_says_why(change: dict[str, Any], why: str) -> None:
    with pytest.raises(Unfit, match=why):
        describe({"model_type": "llama", **SMALL, **change})


@pytest.mark.parametrize("config, why", [
    ({"model_type": "mamba2"}, "recurrent"), ({"model_type": "deepseek_v3"}, "latent"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"), ({"model_type": "bert"}, "encoder"),
    ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "gptq"),
])
def test_unsupported_models_are_refused_by_name(config: dict[str, Any], why: str) -> None:
    with pytest.raises(StartError, match=why) as caught:
        refuse_unsupported(config)
    assert caught.value.exit_code == MODEL_LOAD


def test_longrope_chooses_its_factors_once_by_the_length_served() -> None:
    rope = Rope(dim=4, kind="longrope", original_max=64, short_factor=(1.0, 1.0), long_factor=(2.0, 4.0))
    short, long = frequencies(rope, 64), frequencies(rope, 65)
    torch.testing.assert_close(short / long, torch.tensor([2.0, 4.0]))
