"""Where each option's value comes from: flag, environment, YAML file or default, in that order. Command line only.

Nothing that was written is silently ignored: an unknown flag or YAML key is an error that names the nearest match, an
unknown environment variable that looks like one of ours is a warning.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import foreign
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.options import BY_KEY, BY_NAME, OPTIONS, Option, nearest, parser
from pipeline.values import HIDDEN

PREFIX = "QUARTET_"
OTHER_VARIABLES = frozenset({"QUARTET_CONFIG", "QUARTET_CACHE", "QUARTET_HOME", "QUARTET_TEST_GGUF"})
# Variables of vLLM that our users have set, and what we call them.
VLLM_VARIABLES = {"VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "QUARTET_MAX_AUDIO_CLIP_FILESIZE_MB"}
# What Kubernetes puts into every container beside a service that is called "quartet".
KUBERNETES = re.compile(r"QUARTET_(SERVICE_(HOST|PORT.*)|PORT_\d+_(TCP|UDP).*)")
MAX_FILE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Value:
    value: Any
    source: str                       # "flag", the variable's name, the file's name, or "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every option's value and source, and what the command line asks to do with them."""

    values: dict[str, Value]
    print_config: bool = False
    check: bool = False
    warnings: tuple[str, ...] = ()

    def __getitem__(self, key: str) -> Any:
        return self.values[key].value

    def given(self, key: str) -> bool:
        """Whether somebody set this option."""
        return self.values[key].source != "default"

    def of_model(self, entry: Mapping[str, Any], where: str) -> Settings:
        """The same for another model: `entry` over the defaults for what is a model's own, ours for everything else.

        `entry`: option names (with dashes) to values as YAML has them. StartError names `where` they stand.
        """
        values = {option.key: Value(option.default, "default") if option.of_a_model else self.values[option.key]
                  for option in OPTIONS}
        for name, written in entry.items():
            option = BY_NAME.get(name)
            if option is None or not option.of_a_model:
                close = nearest(name, [o.name for o in OPTIONS if o.of_a_model])
                raise StartError(CONFIG, f"{where}: '{name}' is no option of a model{close}")
            if written is not None:
                words = _words(option, written, where)
                values[option.key] = Value(_convert(option, words, f"{where}: {option.name}"), where)
        return Settings(values=values)

    def show(self) -> str:
        """YAML that could be the configuration file, with the sources as comments and no secret in it."""
        lines = []
        for option in OPTIONS:
            value = self.values[option.key]
            shown = [HIDDEN for _ in value.value] if option.secret else value.value
            lines.append(f"{option.name}: {json.dumps(shown, ensure_ascii=False)}  # {value.source}")
        return "\n".join(lines)


def resolve(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """The settings that a command line and an environment give; StartError with one sentence."""
    own, warnings = _take_foreign(arguments)
    given, unknown = parser().parse_known_args(own)
    if unknown:
        raise StartError(CONFIG, _unknown_argument(unknown[0]))
    flags = dict(vars(given))
    print_config, check = flags.pop("print_config", False), flags.pop("check", False)
    path = flags.pop("config", None) or environment.get("QUARTET_CONFIG") or None
    values = {option.key: Value(option.default, "default") for option in OPTIONS}
    if path is not None:
        values.update(_from_file(Path(path).expanduser(), warnings))
    warnings += _from_environment(environment, values)
    for key, words in flags.items():
        if words is not None:
            option = BY_KEY[key]
            where = option.metavar if option.positional else f"--{option.spelling or option.name}"
            value, source = _convert(option, words, where), "flag"
            if key == "models" and values[key].value:        # the flag adds to the file's list
                value, source = values[key].value + value, f"{values[key].source} and flag"
            values[key] = Value(value, source)
    return Settings(values=values, print_config=print_config, check=check, warnings=tuple(warnings))


def _convert(option: Option, words: object, where: str) -> Any:
    """The value of a text, a switch or a list of texts; the error names `where` it was written."""
    if isinstance(words, bool):
        return words
    texts: list[str] = words if isinstance(words, list) else [str(words)]
    if option.many:
        texts = [part for text in texts for part in _parts(option, text)]
    shown = "" if option.secret or not texts else f", not {texts[-1]!r}"
    try:
        converted = [option.value(text) for text in texts]
    except ValueError as error:
        raise StartError(CONFIG, f"{where} must be {error}{shown}.") from None
    return tuple(converted) if option.many else converted[0]


def _parts(option: Option, text: str) -> list[str]:
    """One text of a list: a value, a JSON list of values, or values between commas."""
    if text.startswith("["):
        try:
            listed = json.loads(text)
        except (ValueError, RecursionError):
            listed = None
        if isinstance(listed, list) and all(isinstance(item, str) for item in listed):
            return listed
    return [part.strip() for part in text.split(",")] if option.commas else [text]


def _take_foreign(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments without the flags of vLLM that Quartet has no option for, and what is to be said of those."""
    own, notes, position = [], list[str](), 0
    words = list(arguments)
    while position < len(words):
        following = words[position + 1] if position + 1 < len(words) else None
        found = foreign.look_up(words[position], following)
        if found is None:
            own.append(words[position])
            position += 1
        else:
            flag, value, count = found
            notes.append(_note(flag, value, f"--{flag.name}"))
            position += count
    return own, notes


def _note(flag: foreign.Foreign, value: str, where: str) -> str:
    """What is to be said of a foreign flag that is taken; StartError for one that is not."""
    if flag.takes(value):
        return f"{where} has no effect of its own. {flag.says}"
    raise StartError(CONFIG, f"{where} is not supported{f' with {value!r}' if flag.values and value else ''}. {flag.says}")


def _unknown_argument(word: str) -> str:
    if not word.startswith("-"):
        return f"Unexpected argument {word!r}: there is one MODEL, and options start with --."
    flag = word.split("=", 1)[0]
    known = [f"--{name}" for option in OPTIONS for name in (option.spelling or option.name, *option.aliases)
             if not option.positional]
    return f"Unknown option {flag}" + nearest(flag, [*known, "--config", "--print-config", "--check", "--help"])


def _from_environment(environment: Mapping[str, str], values: dict[str, Value]) -> list[str]:
    """Take our variables into `values`; the warnings that are due.

    An empty variable counts as not set, unless it is a secret: an empty key must never turn authentication off.
    """
    options = {option.env: option for option in OPTIONS}
    warnings = []
    for name, text in environment.items():
        option = options.get(name)
        if name in VLLM_VARIABLES and not environment.get(VLLM_VARIABLES[name]):
            option = options[VLLM_VARIABLES[name]]
        if option is None:
            if name.startswith(PREFIX) and name not in OTHER_VARIABLES and not KUBERNETES.fullmatch(name):
                warnings.append(f"The variable {name} is no option of quartet" + nearest(name, options))
        elif name == "QUARTET_PORT" and "://" in text:
            warnings.append("QUARTET_PORT looks like a Kubernetes service link and is not used: set "
                            "enableServiceLinks: false, or rename the service.")
        elif text or option.secret:
            listed = option.many and not text.startswith("[")
            words: object = [part.strip() for part in text.split(",")] if listed else text
            values[option.key] = Value(_convert(option, words, name), name)
    return warnings


def _from_file(path: Path, notes: list[str]) -> dict[str, Value]:
    """The options in a YAML file, keys with dashes or underscores; `notes` gets what is to be said of vLLM's keys."""
    import yaml
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise StartError(CONFIG, f"The configuration file {path} is larger than {MAX_FILE_BYTES} bytes.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StartError(CONFIG, f"The configuration file {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark is not None else ""
        raise StartError(CONFIG, f"The configuration file {path} is not valid YAML{where}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise StartError(CONFIG, f"The configuration file {path} must hold keys and values.")
    values: dict[str, Value] = {}
    for key, written in content.items():
        option = BY_NAME.get(str(key).replace("_", "-"))
        if option is None:
            flag = foreign.BY_FLAG.get(str(key).replace("_", "-"))
            if flag is not None:
                notes.append(_note(flag, _text(written), f"{path}: {key}"))
                continue
            close = nearest(str(key).replace("_", "-"), [option.name for option in OPTIONS])
            raise StartError(CONFIG, f"{path}: unknown key '{key}'{close}")
        if option.key in values:
            raise StartError(CONFIG, f"{path}: the key '{option.name}' is there twice.")
        if written is not None:
            words = _words(option, written, path)
            values[option.key] = Value(_convert(option, words, f"{path}: {option.name}"), str(path))
    return values


def _words(option: Option, written: object, path: Path | str) -> object:
    """A YAML value as the text that a flag would have."""
    if isinstance(written, list):
        if not option.many:
            raise StartError(CONFIG, f"{path}: {option.name} must be a single value.")
        return [_text(item) for item in written]
    if isinstance(written, bool) and option.flag:
        return written
    return [_text(written)] if option.many else _text(written)


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
