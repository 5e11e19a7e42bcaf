"""Pooling models against transformers on the same weights: every family, every way to pool, every kind of head."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import StartError
from tests.engine_proc.pool_tiny import (
    HIDDEN,
    LABELS,
    VOCAB,
    add_modules,
    compute,
    cosine,
    hidden,
    load,
    make,
    texts,
)

ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "mpnet", "electra", "modernbert", "nomic_bert")
INPUTS = texts(1, 5, 70, 17, 33)


def unit(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(x, dim=-1)


# ---- embeddings --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", [*ENCODERS, "deberta-v2", "gemma3_text"])
def test_embeddings_equal_the_reference_alone_and_in_a_batch(family: str, tmp_path: Path) -> None:
    net = make(family, tmp_path)
    runner = load(tmp_path)
    assert runner.facts["backend"] == ("own" if family in ENCODERS else "transformers")
    together = compute(runner, INPUTS)
    for ids, row in zip(INPUTS, together):
        expected = unit(hidden(net, ids).mean(0))
        assert row.shape == (1, HIDDEN) and np.abs(row[0] - expected.numpy()).max() < 2e-5
        (alone,) = compute(runner, [ids])
        assert np.array_equal(alone, row) or runner.padded, "bit for bit, as no token sees another input"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_causal_model_embeds_by_its_last_token(family: str, tmp_path: Path) -> None:
    net = make(family, tmp_path, "CausalLM")
    runner = load(tmp_path)
    assert runner.facts["backend"] == "own"
    for ids, row in zip(INPUTS, compute(runner, INPUTS)):
        assert cosine(row, hidden(net.model, ids)[-1]) > 0.99999


def test_a_causal_model_pools_as_it_is_told(tmp_path: Path) -> None:
    net = make("qwen3", tmp_path)
    mean = load(tmp_path, pooler={"pooling_type": "MEAN", "normalize": False})
    assert np.abs(compute(mean, [INPUTS[4]])[0] - hidden(net, INPUTS[4]).mean(0).numpy()).max() < 2e-5


@pytest.mark.parametrize("backend", ["own", "transformers"])
def test_both_backends_agree_on_token_types(backend: str, tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    types = [[int(i > len(ids) // 2) for i in range(len(ids))] for ids in INPUTS]
    for ids, kinds, row in zip(INPUTS, types, compute(load(tmp_path, backend=backend), INPUTS, types=types)):
        assert cosine(row, hidden(net, ids, kinds).mean(0)) > 0.99999


def test_padding_tokens_inside_a_text_do_not_shift_robertas_positions(tmp_path: Path) -> None:
    net = make("roberta", tmp_path)
    inputs = [[5, 1, 1, 7, 8], [9, 10, 1]]                     # 1 is padding
    for ids, row in zip(inputs, compute(load(tmp_path), inputs)):
        assert cosine(row, hidden(net, ids).mean(0)) > 0.99999


@pytest.mark.parametrize("family", ["bert", "modernbert", "qwen3"])
def test_bfloat16_is_close(family: str, tmp_path: Path) -> None:
    net = make(family, tmp_path)
    runner = load(tmp_path, dtype="bfloat16", pooler={"pooling_type": "mean"})
    assert runner.facts["dtype"] == "bfloat16"
    for ids, row in zip(INPUTS, compute(runner, INPUTS)):
        assert cosine(row, hidden(net, ids).mean(0)) > 0.999


def test_int8_is_close(tmp_path: Path) -> None:
    net = make("bert", tmp_path, hidden_size=64, intermediate_size=128)
    runner = load(tmp_path, quantization="int8")
    if runner.facts["arithmetic"] != "kernels":
        pytest.skip("there is no C compiler here")
    for ids, row in zip(INPUTS, compute(runner, INPUTS)):
        assert cosine(row, hidden(net, ids).mean(0)) > 0.999


def test_without_a_compiler_torch_computes_the_same(tmp_path: Path) -> None:
    net = make("mpnet", tmp_path)
    runner = load(tmp_path, kernels=False)
    assert runner.facts["arithmetic"] == "torch"
    for ids, row in zip(INPUTS, compute(runner, INPUTS)):
        assert cosine(row, hidden(net, ids).mean(0)) > 0.99999


# ---- sentence-transformers' modules --------------------------------------------------------------------------------

def weighted(h: torch.Tensor) -> torch.Tensor:
    weights = torch.arange(1, len(h) + 1).float()[:, None]
    return (h * weights).sum(0) / weights.sum()


MODES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls_token": lambda h: h[0], "max_tokens": lambda h: h.max(0).values, "mean_tokens": lambda h: h.mean(0),
    "mean_sqrt_len_tokens": lambda h: h.sum(0) / len(h) ** 0.5, "weightedmean_tokens": weighted, "lasttoken": lambda h: h[-1]}


def test_every_pooling_mode_and_their_concatenation(tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    for names in [*([name] for name in MODES), list(MODES)]:
        add_modules(tmp_path, pooling={f"pooling_mode_{name}": name in names for name in MODES}, normalize=False)
        runner = load(tmp_path)
        assert runner.dimension == HIDDEN * len(names)
        for ids, row in zip(INPUTS, compute(runner, INPUTS)):
            expected = torch.cat([MODES[name](hidden(net, ids)) for name in names])
            assert np.abs(row[0] - expected.numpy()).max() < 5e-5, names


def test_dense_and_normalize_modules_and_requests_that_override(tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    weight = add_modules(tmp_path, pooling={"pooling_mode": "mean"}, dense=20)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps({"similarity_fn_name": "dot"}))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"matryoshka_dimensions": [10, 20]}))
    runner = load(tmp_path)
    assert weight is not None
    raw = torch.tanh(weight @ hidden(net, INPUTS[3]).mean(0))
    assert (runner.dimension, runner.matryoshka, runner.facts["similarity"]) == (20, (10, 20), "dot")
    for values, expected in (({}, unit(raw)), ({"activation": False}, raw), ({"dimensions": 10}, unit(raw[:10])),
                             ({"dimensions": 10, "activation": False}, raw[:10])):
        assert np.abs(compute(runner, [INPUTS[3]], **values)[0][0] - expected.numpy()).max() < 2e-5, values  # type: ignore[arg-type]


def test_prompts_are_left_out_of_pooling_where_the_module_says_so(tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    skips = [0, 2, 1, 3, 0]
    for name in MODES:
        add_modules(tmp_path, pooling={f"pooling_mode_{name}": True, "include_prompt": False}, normalize=False)
        for ids, skip, row in zip(INPUTS, skips, compute(load(tmp_path), INPUTS, skips=skips)):
            skip = min(skip, len(ids) - 1)
            h = hidden(net, ids)
            weights = torch.arange(skip + 1, len(ids) + 1).float()[:, None]          # a place counts from the prompt's start
            expected = {"cls_token": h[0], "weightedmean_tokens": (h[skip:] * weights).sum(0) / weights.sum()}.get(
                name, MODES[name](h[skip:]))
            assert np.abs(row[0] - expected.numpy()).max() < 5e-5, name


def test_colberts_linear_layer_makes_vectors_of_tokens(tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    weight = torch.randn(12, HIDDEN) * 0.2
    save_file({**load_file(tmp_path / "model.safetensors"), "linear.weight": weight}, tmp_path / "model.safetensors")
    runner = load(tmp_path)
    assert runner.tasks == ("token_embed",) and runner.dimension == 12 and runner.facts["late_interaction"] is True
    for ids, rows in zip(INPUTS, compute(runner, INPUTS, "token_embed")):
        assert np.abs(rows - unit(hidden(net, ids) @ weight.T).numpy()).max() < 2e-5


def test_embeddings_of_tokens(tmp_path: Path) -> None:
    net = make("bert", tmp_path)
    rows = compute(load(tmp_path), INPUTS, "token_embed")
    for ids, got in zip(INPUTS, rows):
        assert np.abs(got - unit(hidden(net, ids)).numpy()).max() < 2e-5


def test_a_layout_that_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    make("bert", tmp_path)
    add_modules(tmp_path, pooling={"pooling_mode_mean_tokens": True})
    modules = json.loads((tmp_path / "modules.json").read_text())
    for kind in ("LSTM", "Pooling"):
        modules[2]["type"] = f"sentence_transformers.models.{kind}"
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        with pytest.raises(StartError, match="LSTM" if kind == "LSTM" else "nothing"):
            load(tmp_path)
    modules[2]["path"] = "../elsewhere"
    (tmp_path / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(StartError, match="outside"):
        load(tmp_path)


# ---- classifiers -------------------------------------------------------------------------------------------------

def logits(net: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=torch.tensor([ids])).logits[0]


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "mpnet", "electra", "modernbert", "deberta-v2", "llama"])
def test_class_probabilities_equal_the_reference(family: str, tmp_path: Path) -> None:
    net = make(family, tmp_path, "SequenceClassification", num_labels=LABELS)
    runner = load(tmp_path, "classify")
    assert (runner.facts["backend"] == "transformers") == (family == "deberta-v2")
    assert runner.tasks == ("classify",) and runner.facts["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for ids, row in zip(INPUTS, compute(runner, INPUTS)):
        assert np.abs(row[0] - logits(net, ids).softmax(-1).numpy()).max() < 1e-5
    (raw,) = compute(runner, [INPUTS[2]], activation=False)
    assert np.abs(raw[0] - logits(net, INPUTS[2]).numpy()).max() < 1e-4


def test_modernberts_classifier_may_pool_by_the_mean(tmp_path: Path) -> None:
    net = make("modernbert", tmp_path, "SequenceClassification", num_labels=LABELS, classifier_pooling="mean")
    for ids, row in zip(INPUTS, compute(load(tmp_path, "classify"), INPUTS)):
        assert np.abs(row[0] - logits(net, ids).softmax(-1).numpy()).max() < 1e-5


@pytest.mark.parametrize("family", ["bert", "roberta", "modernbert", "deberta-v2"])
def test_classes_of_tokens(family: str, tmp_path: Path) -> None:
    net = make(family, tmp_path, "TokenClassification", num_labels=LABELS)
    runner = load(tmp_path, "classify")
    assert runner.tasks == ("token_classify",)
    for ids, rows in zip(INPUTS, compute(runner, INPUTS)):
        assert np.abs(rows - logits(net, ids).softmax(-1).numpy()).max() < 1e-5


def test_a_cross_encoder_scores_and_squashes_as_its_files_say(tmp_path: Path) -> None:
    net = make("bert", tmp_path, "SequenceClassification", num_labels=1)
    runner = load(tmp_path, "score")
    assert runner.tasks == ("classify", "score")
    score = float(logits(net, INPUTS[4]))
    assert compute(runner, [INPUTS[4]], "score")[0][0, 0] == pytest.approx(1 / (1 + np.exp(-score)), abs=1e-5)
    config = json.loads((tmp_path / "config.json").read_text())
    config["sentence_transformers"] = {"activation_fn": "torch.nn.modules.linear.Identity"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    runner = load(tmp_path, "score")
    assert compute(runner, [INPUTS[4]], "score")[0][0, 0] == pytest.approx(score, abs=1e-4)
    assert compute(runner, [INPUTS[4]], "score", activation=True)[0][0, 0] == pytest.approx(1 / (1 + np.exp(-score)), abs=1e-5)


def test_other_problem_types(tmp_path: Path) -> None:
    net = make("bert", tmp_path, "SequenceClassification", num_labels=LABELS, problem_type="multi_label_classification")
    assert np.abs(compute(load(tmp_path, "classify"), [INPUTS[4]])[0][0]
                  - logits(net, INPUTS[4]).sigmoid().numpy()).max() < 1e-5


def test_a_causal_model_scores_by_two_of_its_tokens(tmp_path: Path) -> None:
    net = make("qwen3", tmp_path, "CausalLM")
    vocab = {f"w{i}": i for i in range(VOCAB)} | {"no": 40, "yes": 41, "maybe": 42}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": vocab}}))
    runner = load(tmp_path, "score")
    for ids, row in zip(INPUTS, compute(runner, INPUTS, "score")):
        expected = logits(net, ids)[-1, [40, 41]].softmax(-1)[1]
        assert row[0, 0] == pytest.approx(float(expected), abs=1e-5)
    runner = load(tmp_path, "classify", pooler={"classifier_from_token": ["maybe", "no", "yes"]})
    assert runner.facts["labels"] == ["maybe", "no", "yes"]
    expected = logits(net, INPUTS[2])[-1, [42, 40, 41]].softmax(-1).numpy()
    assert np.abs(compute(runner, [INPUTS[2]])[0][0] - expected).max() < 1e-5
    with pytest.raises(StartError, match="'never'"):
        load(tmp_path, "classify", pooler={"classifier_from_token": ["never", "no"]})


def test_an_encoder_without_a_classifier_cannot_classify(tmp_path: Path) -> None:
    make("bert", tmp_path)
    with pytest.raises(StartError, match="no classifier"):
        load(tmp_path, "classify")


def test_a_classifier_embeds_where_it_is_told_to(tmp_path: Path) -> None:
    net = make("bert", tmp_path, "SequenceClassification", num_labels=LABELS)
    for ids, row in zip(INPUTS, compute(load(tmp_path), INPUTS)):
        assert cosine(row, hidden(net.bert, ids).mean(0)) > 0.99999
