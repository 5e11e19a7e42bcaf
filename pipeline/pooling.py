"""Options of pooling models to their configuration: what a model is for, how it pools, long inputs, templates for pairs.

Run by the command line only; the part of `assemble` that is about pooling. StartError with one sentence.
"""
from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint import read_json, task_of
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.pooling_files import PoolingFiles
from pipeline.settings import Settings

TEMPLATES = Path(__file__).parent / "templates"
PARTS = 64                       # contexts that an input in parts may fill, where nobody says otherwise
OVERRIDES = ("architectures", "classifier_from_token", "is_original_qwen3_reranker", "is_matryoshka",
             "matryoshka_dimensions")


def overrides(settings: Settings) -> dict[str, Any]:
    """--hf-overrides, the keys that are about pooling; any other is an error."""
    given: dict[str, Any] = settings["hf_overrides"] or {}
    for name in given:
        if name not in OVERRIDES:
            raise StartError(CONFIG, f"--hf-overrides takes {', '.join(OVERRIDES)}; for '{name}' change config.json in the "
                                     "model's directory.")
    return given


def pooler(settings: Settings) -> dict[str, Any]:
    """--pooler-config, over what --hf-overrides says of pooling."""
    told = {name: value for name, value in overrides(settings).items()
            if name not in ("architectures", "is_original_qwen3_reranker")}
    return {**told, **(settings["pooler_config"] or {})}


def task(settings: Settings, directory: Path) -> str:
    """What a model is for. One that is to score by its logits of two tokens is a scorer."""
    tokens, told = pooler(settings).get("classifier_from_token"), overrides(settings)
    if settings["task"] == "auto" and settings["runner"] != "generate" and (tokens or _is_reranker(told)):
        return "classify" if isinstance(tokens, list) and len(tokens) > 2 else "score"
    return task_of(directory, settings["task"], settings["runner"], settings["convert"])


def long_inputs(settings: Settings, task: str, files: PoolingFiles, context: int) -> dict[str, Any]:
    """The fields of ModelConfig about inputs beyond the context."""
    wanted = settings["long_inputs"]
    if files.chunked and not settings.given("long_inputs"):
        wanted = "chunk"
    if wanted != "chunk":
        return {"long_inputs": wanted}
    if task != "embed" or files.late_interaction:
        raise StartError(CONFIG, "--long-inputs chunk is for models that give one embedding of each input: class scores and "
                                 "vectors per token have no mean.")
    return {"long_inputs": wanted, "max_embed_len": max(context, files.max_embed_len or PARTS * context)}


def pair_template(settings: Settings, task: str, directory: Path, given: str | None) -> str:
    """The template by which a model scores two texts as one chat: --chat-template, or Qwen3-Reranker's own."""
    if task != "score" or given is not None:
        return given or "" if task == "score" else ""
    config = read_json(directory / "config.json")
    if _is_reranker(overrides(settings)) or (
            config.get("model_type") == "qwen3" and config.get("architectures") == ["Qwen3ForCausalLM"]):
        return (TEMPLATES / "qwen3-reranker.jinja").read_text(encoding="utf-8")
    return ""


def _is_reranker(told: dict[str, Any]) -> bool:
    return told.get("is_original_qwen3_reranker") is True
