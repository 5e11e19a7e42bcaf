"""What a model directory says about its tokenizer, as plain data: which tokens are special, which templates exist.

Read by the tokenizer and by the detokenizer, so that both see the same special tokens. JSON only: this module knows
no tokenizer library; `dress` is handed a `tokenizers.Tokenizer` by the stage that loaded it. Never raises anything but
StartError with a sentence for the user.
"""
from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import StartError
from pipeline.exits import MODEL_LOAD

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LISTS = ("additional_special_tokens", "extra_special_tokens")
MAX_FILE = 256 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerFiles:
    """The contents of tokenizer_config.json and its companions, checked."""

    tokenizer_json: Path
    named: dict[str, str] = field(default_factory=dict)       # "bos_token" -> "<s>"
    special: tuple[str, ...] = ()                             # contents that are special, whatever tokenizer.json says
    added: tuple[tuple[int, str, bool], ...] = ()             # (id, content, special) of added_tokens_decoder
    add_bos: bool | None = None                               # None: as tokenizer.json's post-processor does
    add_eos: bool | None = None
    templates: dict[str, str] = field(default_factory=dict)   # name -> Jinja text; "default" is the usual one


def read(directory: str | Path) -> TokenizerFiles:
    """The facts about the tokenizer in `directory` (or about a tokenizer.json given by its path)."""
    path = Path(directory)
    path, folder = (path, path.parent) if path.is_file() else (path / "tokenizer.json", path)
    if not path.is_file():
        raise StartError(MODEL_LOAD, f"There is no tokenizer.json in {folder}.")
    config = {**_json(folder / "special_tokens_map.json"), **_json(folder / "tokenizer_config.json")}
    named = {name: text for name in NAMED if (text := _content(config.get(name))) is not None}
    added = tuple(sorted(_added(config.get("added_tokens_decoder"))))
    special = [*named.values(), *(content for _, content, is_special in added if is_special)]
    for key in LISTS:
        values = config.get(key)
        values = values.values() if isinstance(values, dict) else values if isinstance(values, list) else ()
        special.extend(text for value in values if (text := _content(value)) is not None)
    return TokenizerFiles(
        tokenizer_json=path, named=named, special=tuple(dict.fromkeys(special)), added=added,
        add_bos=_flag(config.get("add_bos_token")), add_eos=_flag(config.get("add_eos_token")),
        templates=_templates(folder, config.get("chat_template")))


def describe(directory: str | Path) -> dict[str, Any]:
    """tokenizer_config.json as it is, with the chat template where a file of its own holds it; StartError."""
    folder = Path(directory)
    folder = folder.parent if folder.is_file() else folder
    config = _json(folder / "tokenizer_config.json")
    templates = _templates(folder, config.get("chat_template"))
    if templates:
        config["chat_template"] = templates["default"] if list(templates) == ["default"] else [
            {"name": name, "template": text} for name, text in templates.items()]
    return config


def dress(tokenizer: Any, files: TokenizerFiles) -> frozenset[int]:
    """Register what only tokenizer_config.json knows; take truncation and padding off; the ids that are special.

    A token is added only where that gives it the id that the configuration names: a token that the model has no
    embedding for is left out rather than put behind the vocabulary.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for number, content, is_special in files.added:
        if tokenizer.token_to_id(content) is None and tokenizer.get_vocab_size(with_added_tokens=True) == number:
            (tokenizer.add_special_tokens if is_special else tokenizer.add_tokens)([content])
    present = [content for content in files.special if tokenizer.token_to_id(content) is not None]
    tokenizer.add_special_tokens(present)
    ids = {number for number, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    return frozenset(ids | {tokenizer.token_to_id(content) for content in present})


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} when there is no such file."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_FILE:
            raise ValueError("it is too large")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("it is no JSON object")
    except (OSError, ValueError) as error:
        raise StartError(MODEL_LOAD, f"{path} cannot be read: {error}.") from None
    return value


def _content(value: Any) -> str | None:
    """The text of a token given as a string or as an AddedToken's mapping; None for nothing."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) and text else None


def _flag(value: Any) -> bool | None:
    return value if isinstance(value, bool) else None


def _added(value: Any) -> list[tuple[int, str, bool]]:
    if not isinstance(value, dict):
        return []
    return [(int(number), text, bool(token.get("special"))) for number, token in value.items()
            if number.isdigit() and isinstance(token, dict) and (text := _content(token)) is not None]


def _templates(folder: Path, value: Any) -> dict[str, str]:
    """Templates from tokenizer_config.json, then from files, which override it as in transformers."""
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        for entry in value:
            name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None, None)
            if isinstance(name, str) and isinstance(text, str):
                templates[name] = text
    files = [("default", folder / "chat_template.jinja")]
    extra = folder / "additional_chat_templates"
    if extra.is_dir():
        files.extend((path.stem, path) for path in sorted(extra.glob("*.jinja")))
    for name, path in files:
        if path.is_file():
            try:
                templates[name] = path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise StartError(MODEL_LOAD, f"{path} cannot be read: {error}.") from None
    return templates
