"""Which models a server serves, each with settings of its own: MODEL, those of --model, those of the file's list.

Run by the command line only. The command line's model and engine options are about MODEL (or the embedded model that
stands in for it); those of the others stand in their entries of the file. StartError with one sentence.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint import Source, locate
from pipeline.errors import StartError
from pipeline.exits import CONFIG
from pipeline.options import OPTIONS
from pipeline.settings import Settings

SHORT = {"name": "served-model-name", "names": "served-model-name", "path": "model", "replicas": "data-parallel-size"}
MAX_MODELS = 64


@dataclass(frozen=True, slots=True)
class Served:
    """One model to serve."""

    settings: Settings
    source: Source

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.settings["served_model_name"]) or (self.source.name,)


def model_settings(settings: Settings) -> list[Settings]:
    """The settings of each model, the first one first; nothing is looked up on disk.

    With a list in the file (or the environment) the list is all, unless MODEL is given too; beside --model alone the
    embedded model is served. An entry without a path is the embedded model.
    """
    entries, source = settings["models"], settings.values["models"].source
    others = [settings.of_model(_spelled(entry, where), where)
              for number, entry in enumerate(entries)
              for where in (f"the model {entry.get('name', number + 1)!r}",)]
    if len(others) >= MAX_MODELS:
        raise StartError(CONFIG, f"At most {MAX_MODELS} models are served by one server.")
    if others and source != "flag" and not settings.given("model"):
        for option in OPTIONS:
            if option.of_a_model and settings.given(option.key):
                raise StartError(CONFIG, f"--{option.name} is about MODEL, which is not given: set it for each model in the "
                                         "list of models.")
        return others
    return [settings, *others]


def find(each: Sequence[Settings]) -> list[Served]:
    """Where each model is; a name that two of them have is an error."""
    found = [Served(settings, locate(settings["model"])) for settings in each]
    known: dict[str, Served] = {}
    for served in found:
        for name in served.names:
            if name in known:
                raise StartError(CONFIG, f"Two models are called '{name}': give one of them another name.")
            known[name] = served
    return found


def _spelled(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """An entry with the names of options for keys."""
    spelled: dict[str, Any] = {}
    for key, value in entry.items():
        name = str(key).replace("_", "-")
        name = SHORT.get(name, name)
        if name in spelled:
            raise StartError(CONFIG, f"{where}: the key '{key}' is there twice.")
        spelled[name] = value
    return spelled
