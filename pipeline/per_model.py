"""What a text stage holds per served model: loaded at first use, a failure remembered."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from pipeline.config import ModelConfig
from pipeline.errors import StartError

T = TypeVar("T")


class PerModel(Generic[T]):
    """Model number -> what `load` made of its configuration."""

    def __init__(self, models: Sequence[ModelConfig], load: Callable[[ModelConfig], T]) -> None:
        self._models, self._load = models, load
        self._known: dict[int, T | StartError] = {}

    def get(self, model: int) -> T:
        """StartError when it cannot be loaded; IndexError for a model that does not exist."""
        known = self._known.get(model)
        if known is None:
            try:
                known = self._load(self._models[model])
            except StartError as error:
                known = error
            self._known[model] = known
        if isinstance(known, StartError):
            raise known
        return known
