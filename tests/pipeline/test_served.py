"""Several models: who is served, with which options, in which order, and what each is for."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline import assemble, checkpoint
from pipeline.checkpoint import task_of
from pipeline.config import ModelConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.served import find, model_settings
from pipeline.settings import resolve
from tests.pipeline.test_checkpoint import model


@pytest.fixture(autouse=True)
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What stands in for the embedded model."""
    folder = model(tmp_path / "embedded")
    monkeypatch.setattr(checkpoint, "embedded", lambda: folder)
    return folder


def configured(*arguments: str, environment: dict[str, str] | None = None) -> list[ModelConfig]:
    settings = resolve(arguments, environment or {})
    assemble.check(settings)
    return [assemble.model_config(m.settings, m.source, Path(m.source.where), Path(m.source.where))
            for m in find(model_settings(settings))]


def refused(*arguments: str) -> str:
    with pytest.raises(StartError) as error:
        configured(*arguments)
    assert error.value.exit_code == CONFIG and error.value.message.endswith((".", "?"))
    return error.value.message


def written(tmp_path: Path, **content: Any) -> str:
    (tmp_path / "quartet.yaml").write_text(json.dumps(content))
    return str(tmp_path / "quartet.yaml")


def encoder(folder: Path, *labels: str, **config: Any) -> Path:
    """A BERT without head, or with one for these classes."""
    if labels:
        config["id2label"] = dict(enumerate(labels))
    return model(folder, architectures=["BertForSequenceClassification" if labels else "BertModel"], model_type="bert",
                 max_position_embeddings=512, type_vocab_size=2, **config)


def test_flags_add_models_to_model_or_to_the_embedded_one(tmp_path: Path) -> None:
    a, b = encoder(tmp_path / "a"), encoder(tmp_path / "b", "NO", "YES")
    alone = configured("--model", f"x={a}", "--model", f"y={b}")
    assert [(m.names, m.task) for m in alone] == [
        ((checkpoint.EMBEDDED_NAME,), "generate"), (("x",), "embed"), (("y",), "classify")]
    chat = model(tmp_path / "chat")
    beside = configured(str(chat), "--dtype", "float32", "--served-model-name", "c", "--model", f"x={a}")
    assert [(m.names, m.engine.dtype) for m in beside] == [(("c",), "float32"), (("x",), "auto")]
    assert [m.names for m in configured(environment={"QUARTET_MODELS": f"x={a},y={b}"})] == [("x",), ("y",)]


def test_the_list_of_the_file_is_all_there_is_and_each_entry_has_its_options(tmp_path: Path) -> None:
    a, b = encoder(tmp_path / "a"), encoder(tmp_path / "b", "NO", "YES")
    file = written(tmp_path, port=9000, seed=7, models=[
        {"name": "x", "path": str(a), "dtype": "float32", "replicas": 2, "max_model_len": 128, "threads": 1},
        {"names": ["y", "why"], "path": str(b), "null-engine": "labels=3"}, {"name": "chat"}])
    x, y, chat = configured("--config", file)
    assert (x.names, x.engine.dtype, x.replicas, x.max_model_len, x.engine.threads) == (("x",), "float32", 2, 128, 1)
    assert (y.names, y.engine.backend, y.engine.null_script) == (("y", "why"), "null", "labels=3")
    assert chat.names == ("chat",) and chat.path.endswith("embedded") and chat.engine.dtype == "auto"
    first = configured(str(model(tmp_path / "first")), "--config", file, "--dtype", "half", "--model", f"z={a}")
    assert [m.names[0] for m in first] == ["first", "x", "y", "chat", "z"]
    assert [m.engine.dtype for m in first] == ["float16", "float32", "auto", "auto", "auto"]


def test_what_is_wrong_with_a_list_is_said_in_one_sentence(tmp_path: Path) -> None:
    a = encoder(tmp_path / "a")

    def file(*entries: Any, **more: Any) -> tuple[str, str]:
        return "--config", written(tmp_path, models=list(entries), **more)
    assert "NAME=PATH" in refused("--model", str(a))
    assert "Two models are called 'x'" in refused("--model", f"x={a}", "--model", f"x={a}")
    assert "Two models are called 'a'" in refused(*file({"path": str(a)}, {"path": str(a)}))
    assert "did you mean dtype?" in refused(*file({"path": str(a), "dtpye": "auto"}))
    assert "'port' is no option of a model" in refused(*file({"path": str(a), "port": 80}))
    assert "the model 'x': dtype must be" in refused(*file({"name": "x", "path": str(a), "dtype": "int3"}))
    assert "is there twice" in refused(*file({"path": str(a), "model": str(a)}))
    assert "There is no model at" in refused(*file({"path": "/no/such"}))
    assert "must be NAME=PATH" in refused(*file("just-a-name"))
    assert "--dtype is about MODEL" in refused(*file({"path": str(a)}), "--dtype", "float32")
    assert "--threads is about MODEL" in refused(*file({"path": str(a)}, threads=2))
    assert "--null-step needs" in refused(*file({"path": str(a), "null-step": 1}))
    assert "for pooling models" in refused("--pooler-config", "{}", str(model(tmp_path / "chat")))
    assert "--convert needs --runner pooling" in refused(str(a), "--runner", "generate", "--convert", "embed")


def test_the_printed_configuration_can_be_read_back(tmp_path: Path) -> None:
    a = encoder(tmp_path / "a")
    file = written(tmp_path, models=[{"name": "x", "path": str(a), "dtype": "float32"}])
    shown = resolve(["--config", file], {}).show()
    (tmp_path / "again.yaml").write_text("\n".join(line for line in shown.splitlines() if "# default" not in line))
    assert configured("--config", str(tmp_path / "again.yaml")) == configured("--config", file)


@pytest.mark.parametrize(("config", "options", "task"), [
    ({"architectures": ["LlamaForCausalLM"]}, (), "generate"), ({"architectures": ["GPT2LMHeadModel"]}, (), "generate"),
    ({}, (), "generate"), ({"architectures": ["BertModel"]}, (), "embed"),
    ({"architectures": ["BertForMaskedLM"]}, (), "embed"),
    ({"architectures": ["Qwen3Model"]}, (), "embed"), ({"architectures": ["T5EncoderModel"]}, (), "embed"),
    ({"architectures": ["BertForSequenceClassification"], "id2label": {"0": "x"}}, (), "score"),
    ({"architectures": ["BertForSequenceClassification"]}, (), "classify"),
    ({"architectures": ["BertForTokenClassification"]}, (), "classify"),
    ({"architectures": ["WhisperForConditionalGeneration"], "model_type": "whisper"}, (), "transcribe"),
    ({"architectures": ["LlamaForCausalLM"]}, ("auto", "pooling", "auto"), "embed"),
    ({"architectures": ["LlamaForCausalLM"]}, ("auto", "auto", "embed"), "embed"),
    ({"architectures": ["LlamaForCausalLM"], "num_labels": 1}, ("auto", "pooling", "classify"), "score"),
    ({"architectures": ["LlamaForCausalLM"]}, ("auto", "pooling", "none"), "generate"),
    ({"architectures": ["BertModel"]}, ("auto", "pooling", "auto"), "embed"),
    ({"architectures": ["BertForSequenceClassification"]}, ("auto", "pooling", "auto"), "classify"),
    ({"architectures": ["LlamaForCausalLM"]}, ("classify", "auto", "auto"), "classify"),
])
def test_what_a_model_is_for(tmp_path: Path, config: dict[str, Any], options: tuple[str, str, str], task: str) -> None:
    assert task_of(model(tmp_path / "m", **config), *(options or ("auto", "auto", "auto"))) == task


def test_a_sentence_transformers_layout_makes_an_embedder_and_says_how(tmp_path: Path) -> None:
    folder = encoder(tmp_path / "m")
    (folder / "modules.json").write_text(json.dumps([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}]))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 256}))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(
        {"prompts": {"query": "query: "}, "default_prompt_name": "query"}))
    (found,) = configured(str(folder))
    assert (found.task, found.max_model_len, found.num_type_ids) == ("embed", 256, 2)
    assert (found.prompts, found.default_prompt) == ({"query": "query: "}, "query")
    assert configured(str(folder), "--max-model-len", "512")[0].max_model_len == 512
    causal = model(tmp_path / "causal", architectures=["Qwen3ForCausalLM"])
    (causal / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Transformer"}]))
    assert task_of(causal, "auto", "auto", "auto") == "embed"
    assert task_of(causal, "auto", "generate", "auto") == "generate"
    with pytest.raises(StartError, match="cannot generate text"):
        task_of(folder, "auto", "generate", "auto")


def test_positions_of_roberta_begin_behind_the_paddings(tmp_path: Path) -> None:
    folder = model(tmp_path / "m", architectures=["RobertaModel"], model_type="roberta", max_position_embeddings=514,
                   pad_token_id=1)
    assert configured(str(folder))[0].max_model_len == 512
    assert "context of 512" in refused(str(folder), "--max-model-len", "514")


def test_long_inputs_in_parts(tmp_path: Path) -> None:
    folder = str(encoder(tmp_path / "m"))
    (found,) = configured(folder, "--long-inputs", "chunk", "--max-model-len", "100")
    assert (found.long_inputs, found.max_embed_len) == ("chunk", 6400)
    vllm = ("--pooler-config", '{"enable_chunked_processing": true, "max_embed_len": 3000}')
    (found,) = configured(folder, *vllm)
    assert (found.long_inputs, found.max_embed_len) == ("chunk", 3000)
    (found,) = configured(folder, "--long-inputs", "truncate", *vllm)
    assert (found.long_inputs, found.max_embed_len) == ("truncate", 0)
    assert "one embedding of each input" in refused(folder, "--task", "classify", "--long-inputs", "chunk")
    assert "max_embed_len" in refused(folder, "--pooler-config", '{"max_embed_len": "long"}')


def test_a_causal_reranker_and_what_vllm_calls_it(tmp_path: Path) -> None:
    folder = str(model(tmp_path / "m", architectures=["Qwen3ForCausalLM"], model_type="qwen3"))
    (found,) = configured(folder)
    assert (found.task, found.pair_template) == ("generate", "")
    (found,) = configured(folder, "--task", "score")
    assert found.task == "score" and "<Instruct>: {{ instruction" in found.pair_template
    (found,) = configured(folder, "--hf-overrides", json.dumps({
        "architectures": ["Qwen3ForSequenceClassification"], "classifier_from_token": ["no", "yes"],
        "is_original_qwen3_reranker": True}), "--chat-template", "{{ query }}{{ document }}")
    assert (found.task, found.pair_template) == ("score", "{{ query }}{{ document }}")
    assert found.pooler == {"classifier_from_token": ["no", "yes"]}
    (found,) = configured(folder, "--pooler-config", '{"classifier_from_token": ["a", "b", "c"]}')
    assert (found.task, found.pair_template) == ("classify", "")
    assert "'rope_theta'" in refused(folder, "--hf-overrides", '{"rope_theta": 1}')
