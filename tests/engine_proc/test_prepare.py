"""Preparing a model: what comes out of a GGUF file, what is cached, and one sentence for everything that is wrong."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from engine_proc import prepare
from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD
from tests.engine_proc.tiny import Driver, load, make_checkpoint, sequence
from tests.serving import gguf as default_gguf

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"0123456789abcdefghijklmnop", "Ġ", "ĠĠ", "12", "Ġ1", "ab"]
MERGES = ["Ġ Ġ", "1 2", "Ġ 1", "a b"]


def quiet(phase: str, percent: int) -> None:
    """Progress that nobody reads."""


def run(source: str, cache: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "engine_proc.prepare", "--source", source, "--out-root", str(cache), *more],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, **environment})


def write_gguf(path: Path, pre: str = "smollm", rope_freqs: bool = False, arch: str = "llama") -> Path:
    """A llama of one layer with ChatML tokens, whose eos is <|endoftext|>."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    source = np.random.default_rng(0)
    shapes = {"token_embd": (len(TOKENS), 32), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
              "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32),
              "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48)}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", source.normal(size=shape).astype(np.float32) * 0.3)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    if rope_freqs:
        writer.add_tensor("rope_freqs.weight", np.array([1, 1, 8, 8], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_default_model_is_complete_private_and_found_again(smollm2: Path) -> None:
    generation = json.loads((smollm2 / "generation_config.json").read_text())
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    config = json.loads((smollm2 / "config.json").read_text())
    assert generation["eos_token_id"] == 2 and "<|im_start|>assistant" in settings["chat_template"]
    assert config["dtype"] == "bfloat16" and config["vocab_size"] == 49152
    assert (smollm2.stat().st_mode & 0o777) == 0o700

    again = run(str(default_gguf()), smollm2.parent)
    assert again.stdout.splitlines() == [json.dumps({"path": str(smollm2), "tokenizer": str(smollm2)})]


def test_the_default_tokenizer_splits_off_digits(smollm2: Path) -> None:
    """As the original tokenizer of SmolLM2 does, and the plain byte-level split does not."""
    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("x  12 34").tokens == ["x", "ĠĠ", "1", "2", "Ġ", "3", "4"]


def test_a_gguf_file_becomes_a_directory_that_runs(tmp_path: Path) -> None:
    phases: list[str] = []
    source = write_gguf(tmp_path / "a.gguf", rope_freqs=True)
    result = prepare.prepare(str(source), tmp_path / "cache", None, False, lambda phase, _: phases.append(phase))
    directory = Path(result["path"])
    config = json.loads((directory / "config.json").read_text())
    generation = json.loads((directory / "generation_config.json").read_text())
    assert "dequantising" in phases and result["tokenizer"] == result["path"]
    assert generation["eos_token_id"] == [0, 2], "what ends a turn in the chat template ends the answer"
    assert config["rope_parameters"]["rope_type"] == "llama3" and config["rope_parameters"]["factor"] == 8.0
    assert Tokenizer.from_file(str(directory / "tokenizer.json")).encode("ab12").tokens == ["ab", "1", "2"]
    runner = load(directory, 64)
    assert runner.facts["dtype"] == "bfloat16" and len(Driver(runner).run(sequence(1, [5, 6], 8))[0]) == 8

    # A changed file is another model; an unchanged one is not converted again.
    assert prepare.prepare(str(source), tmp_path / "cache", None, False, quiet) == result
    write_gguf(source, pre="gpt-2")
    other = prepare.prepare(str(source), tmp_path / "cache", None, False, quiet)
    assert other["path"] != result["path"]
    assert Tokenizer.from_file(other["tokenizer"] + "/tokenizer.json").encode("12").tokens == ["12"]


def test_a_broken_gguf_file_gives_one_sentence_and_leaves_nothing(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "whole.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for data in (whole[:len(whole) // 2], whole[:40], b"GGUF" + b"\xff" * 64):
        cut.write_bytes(data)
        with pytest.raises(StartError) as caught:
            prepare.prepare(str(cut), tmp_path / "cache", None, False, quiet)
        assert caught.value.exit_code == MODEL_LOAD and "\n" not in caught.value.message
        assert list((tmp_path / "cache").iterdir()) == []
    done = run(str(cut), tmp_path / "cache")
    assert done.returncode == MODEL_LOAD and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_an_architecture_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf", arch="clip")
    with pytest.raises(StartError, match="clip"):
        prepare.prepare(str(source), tmp_path / "cache", None, False, quiet)


def test_a_hugging_face_directory_is_used_where_it_is(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    (directory / "tokenizer.json").write_text("{}")
    result = prepare.prepare(str(directory), tmp_path / "cache", None, False, quiet)
    assert result == {"path": str(directory), "tokenizer": str(directory)}
    assert not (tmp_path / "cache").exists()


def test_an_old_tokenizer_is_converted_into_the_cache(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    (directory / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(TOKENS)}))
    (directory / "merges.txt").write_text("#version: 0.2\n" + "\n".join(MERGES) + "\n")
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    result = prepare.prepare(str(directory), tmp_path / "cache", None, False, quiet)
    assert result["path"] == str(directory) and Path(result["tokenizer"]).parent == tmp_path / "cache"
    tokenizer = Tokenizer.from_file(result["tokenizer"] + "/tokenizer.json")
    assert tokenizer.encode("ab12").tokens == ["ab", "12"]


@pytest.mark.parametrize("source, why", [
    ("/no/such/place", "no model at"), ("nobody/nothing", "not in the local cache"), ("/etc/hostname", "not a GGUF"),
    ("missing.gguf", "no model at"),
])
def test_what_is_no_model_is_said_within_one_sentence(source: str, why: str, tmp_path: Path) -> None:
    done = run(source, tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hub"))
    assert done.returncode == MODEL_LOAD and why in done.stderr and done.stderr.count("\n") == 1


def test_broken_directories_are_refused_without_torch(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    with pytest.raises(StartError, match="no tokenizer"):
        prepare.prepare(str(directory), tmp_path / "cache", None, False, quiet)
    with pytest.raises(StartError, match="no tokenizer directory"):
        prepare.prepare(str(directory), tmp_path / "cache", str(tmp_path / "none"), False, quiet)
    weights = directory / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 10)
    program = f"""
import sys
from pathlib import Path
from engine_proc import prepare
from pipeline.errors import StartError
try:
    prepare.prepare({str(directory)!r}, Path({str(tmp_path)!r}), None, False, print)
except StartError as error:
    assert "truncated" in error.message, error
    assert not {{"torch", "transformers"}} & set(sys.modules)
else:
    raise SystemExit("accepted")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_two_that_prepare_the_same_thing_both_find_it(tmp_path: Path) -> None:
    with prepare.cache_entry(tmp_path, "x") as (final, work):
        assert work is not None
        (work / "mine").touch()
        with prepare.cache_entry(tmp_path, "x") as (_, other):
            assert other is not None and other != work
            (other / "theirs").touch()
    assert {file.name for file in final.iterdir()} == {"theirs", ".complete"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]
