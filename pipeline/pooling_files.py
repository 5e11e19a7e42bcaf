"""What a model directory's JSON files say about pooling: sentence-transformers' modules, prompts, score settings.

Plain JSON only, for the command line (task, prompts), the tokenizer (prompts, lengths) and the engine (modules). Raises
StartError with one sentence for a layout that this server cannot honour. Must never load weights.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline.checkpoint import read_json
from pipeline.errors import StartError
from pipeline.exits import CONFIG, MODEL_LOAD

MODES = ("cls", "mean", "max", "last", "weightedmean", "mean_sqrt_len")
SPELLINGS = {"cls": "cls", "cls_token": "cls", "first": "cls", "mean": "mean", "avg": "mean", "mean_tokens": "mean",
             "max": "max", "max_tokens": "max", "last": "last", "lasttoken": "last", "last_token": "last",
             "weightedmean": "weightedmean", "weightedmean_tokens": "weightedmean",
             "mean_sqrt_len": "mean_sqrt_len", "mean_sqrt_len_tokens": "mean_sqrt_len", "all": "all", "token": "all"}
ACTIVATIONS = {"Identity": "none", "Tanh": "tanh", "ReLU": "relu", "GELU": "gelu", "SiLU": "silu",
               "Sigmoid": "sigmoid", "Softmax": "softmax"}
MAX_MODULES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A linear layer after pooling (or, where it comes before, on each token)."""

    path: str                                # directory with its model.safetensors, relative to the model's
    inputs: int
    outputs: int
    bias: bool
    activation: str                          # a value of ACTIVATIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolingFiles:
    """What turns token vectors into an embedding, and what goes ahead of a text."""

    found: bool = False                      # whether there is a modules.json
    weights: str = ""                        # directory of the transformer, relative to the model's
    pooling: tuple[str, ...] = ()            # of MODES, side by side; ("all",): a vector per token; (): not told
    include_prompt: bool = True              # whether the prompt's tokens are pooled
    token_dense: tuple[Dense, ...] = ()      # ahead of pooling
    dense: tuple[Dense, ...] = ()
    normalize: bool | None = None            # None: not told
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None        # name of the prompt for those who name none
    max_seq_length: int | None = None
    similarity: str = ""                     # cosine | dot | ...
    matryoshka: tuple[int, ...] | None = None
    classifier_tokens: tuple[str, ...] = ()  # of a causal model that scores by the logits of tokens
    score_activation: str = ""               # of a cross-encoder: a value of ACTIVATIONS; "": not told
    chunked: bool = False                    # inputs beyond the context are computed in parts
    max_embed_len: int = 0                   # tokens of such an input; 0: not told

    @property
    def late_interaction(self) -> bool:
        return self.pooling == ("all",)


def describe(directory: Path, overrides: Mapping[str, Any] | None = None) -> PoolingFiles:
    """Read modules.json and what it points to; `overrides` are those of --pooler-config."""
    listed = _modules(directory)
    files = PoolingFiles() if listed is None else _layout(directory, listed)
    told = read_json(directory / "config_sentence_transformers.json")
    prompts = told.get("prompts")
    default = told.get("default_prompt_name")
    files = replace(
        files, prompts={str(k): str(v) for k, v in prompts.items()} if isinstance(prompts, dict) else {},
        default_prompt=default if isinstance(default, str) else None,
        similarity=str(told.get("similarity_fn_name") or ""))
    return _override(_config(directory, files), overrides or {})


def _modules(directory: Path) -> list[dict[str, Any]] | None:
    path = directory / "modules.json"
    if not path.exists():
        return None
    listed = read_json_list(path)
    if not 0 < len(listed) <= MAX_MODULES or not all(isinstance(m, dict) for m in listed):
        raise StartError(MODEL_LOAD, f"The file {path} is no list of modules.")
    return listed


def read_json_list(path: Path) -> list[Any]:
    """A JSON list; `read_json` reads objects only."""
    try:
        value = json.loads(path.read_bytes()[:2**20])
    except OSError as error:
        raise StartError(MODEL_LOAD, f"The file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise StartError(MODEL_LOAD, f"The file {path} is not valid JSON.") from None
    if not isinstance(value, list):
        raise StartError(MODEL_LOAD, f"The file {path} is not a JSON list.")
    return value


def _layout(directory: Path, listed: list[dict[str, Any]]) -> PoolingFiles:
    files = PoolingFiles(found=True, normalize=False, pooling=("all",))
    for module in sorted(listed, key=lambda m: m.get("idx", 0)):
        kind, path = str(module.get("type")).rsplit(".", 1)[-1], str(module.get("path") or "")
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise StartError(MODEL_LOAD, f"The file {directory / 'modules.json'} points outside its directory.")
        config = read_json(directory / path / "config.json")
        if kind == "Transformer":
            length = read_json(directory / path / "sentence_bert_config.json").get("max_seq_length")
            files = replace(files, weights=path, max_seq_length=length if isinstance(length, int) else None)
        elif kind == "Pooling":
            files = replace(files, pooling=_pooling(config, directory),
                            include_prompt=config.get("include_prompt", True) is not False)
        elif kind == "Dense":
            dense = _dense(config, path, directory)
            files = (replace(files, token_dense=(*files.token_dense, dense)) if files.late_interaction
                     else replace(files, dense=(*files.dense, dense)))
        elif kind == "Normalize":
            files = replace(files, normalize=True)
        else:
            raise StartError(MODEL_LOAD, f"The model {directory} has a sentence-transformers module '{kind}', which this "
                                         "server does not know.")
    return files


def _pooling(config: dict[str, Any], directory: Path) -> tuple[str, ...]:
    told = config.get("pooling_mode")
    if told is not None:
        names = [str(name) for name in (told if isinstance(told, list) else [told])]
    else:
        names = [key.removeprefix("pooling_mode_") for key, value in config.items()
                 if key.startswith("pooling_mode_") and value is True]
    modes = [SPELLINGS.get(name, "") for name in names]
    if not modes or not all(mode in MODES for mode in modes):
        raise StartError(MODEL_LOAD, f"The model {directory} pools by {names or 'nothing'}, which this server does not "
                                     "know.")
    order = ("cls", "max", "mean", "mean_sqrt_len", "weightedmean", "last")      # sentence-transformers' own order
    return tuple(mode for mode in order if mode in modes) if told is None else tuple(modes)


def _dense(config: dict[str, Any], path: str, directory: Path) -> Dense:
    name = str(config.get("activation_function") or "Identity").rsplit(".", 1)[-1]
    inputs, outputs = config.get("in_features"), config.get("out_features")
    if name not in ACTIVATIONS or not isinstance(inputs, int) or not isinstance(outputs, int):
        raise StartError(MODEL_LOAD, f"The dense module {directory / path} cannot be used: its configuration is not "
                                     "known here.")
    return Dense(path=path, inputs=inputs, outputs=outputs, bias=config.get("bias", True) is not False,
                 activation=ACTIVATIONS[name])


def _config(directory: Path, files: PoolingFiles) -> PoolingFiles:
    """What the model's own config.json adds: sizes that embeddings may be cut to, a cross-encoder's activation."""
    config = read_json(directory / files.weights / "config.json")
    sizes = config.get("matryoshka_dimensions")
    matryoshka: tuple[int, ...] | None = None
    if isinstance(sizes, list) and sizes:
        matryoshka = tuple(sorted(int(size) for size in sizes if isinstance(size, int) and size > 0))
    elif config.get("is_matryoshka") is True:
        matryoshka = ()
    told = config.get("sentence_transformers")
    name = config.get("sbert_ce_default_activation_function") or (
        told.get("activation_fn") if isinstance(told, dict) else None)
    activation = ACTIVATIONS.get(str(name).rsplit(".", 1)[-1], "") if name else ""
    if name and not activation:
        raise StartError(MODEL_LOAD, f"The model {directory} squashes its scores by '{name}', which this server does not "
                                     "know.")
    return replace(files, matryoshka=matryoshka, score_activation=activation)


def _override(files: PoolingFiles, overrides: Mapping[str, Any]) -> PoolingFiles:
    """--pooler-config: pooling_type, normalize, use_activation, matryoshka_dimensions, classifier_from_token ..."""
    for key, value in overrides.items():
        if key in ("pooling_type", "seq_pooling_type", "tok_pooling_type"):
            mode = SPELLINGS.get(str(value).lower())
            if mode is None:
                raise StartError(CONFIG, f"--pooler-config: there is no pooling '{value}'; there are "
                                         f"{', '.join(MODES)} and all.")
            files = replace(files, pooling=(mode,))
        elif key in ("normalize", "use_activation"):
            if not isinstance(value, bool):
                raise StartError(CONFIG, f"--pooler-config: {key} must be true or false.")
            files = (replace(files, normalize=value) if key == "normalize" else
                     replace(files, normalize=value, score_activation=files.score_activation if value else "none"))
        elif key == "classifier_from_token":
            if not isinstance(value, list) or len(value) < 2 or not all(isinstance(t, str) and t for t in value):
                raise StartError(CONFIG, f"--pooler-config: {key} must be a list of two tokens or more.")
            files = replace(files, classifier_tokens=tuple(value))
        elif key == "is_matryoshka":
            if not isinstance(value, bool):
                raise StartError(CONFIG, f"--pooler-config: {key} must be true or false.")
            files = replace(files, matryoshka=() if value else None)
        elif key == "enable_chunked_processing":
            if not isinstance(value, bool):
                raise StartError(CONFIG, f"--pooler-config: {key} must be true or false.")
            files = replace(files, chunked=value)
        elif key == "max_embed_len":
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise StartError(CONFIG, f"--pooler-config: {key} must be a number of tokens.")
            files = replace(files, max_embed_len=value)
        elif key == "matryoshka_dimensions":
            if not isinstance(value, list) or not all(isinstance(n, int) and n > 0 for n in value):
                raise StartError(CONFIG, f"--pooler-config: {key} must be a list of sizes.")
            files = replace(files, matryoshka=tuple(sorted(value)))
        else:
            raise StartError(CONFIG, f"--pooler-config has an unknown key '{key}'.")
    return files


def token_id(tokenizer: Path, token: str) -> int | None:
    """The id of one token of a tokenizer.json (a file, or a directory with one); None when there is no such token."""
    content = read_json(tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json", required=True)
    for added in content.get("added_tokens") or ():
        if isinstance(added, dict) and added.get("content") == token and isinstance(added.get("id"), int):
            return int(added["id"])
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict):
        return vocab[token] if isinstance(vocab.get(token), int) else None
    entries = vocab if isinstance(vocab, list) else []
    return next((i for i, entry in enumerate(entries) if isinstance(entry, list) and entry and entry[0] == token), None)
