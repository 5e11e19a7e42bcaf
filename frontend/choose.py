"""Which served model a request means: by name, or, without one, the only one of the kind that the endpoint needs.

Run by the frontend; pure functions.
"""
from __future__ import annotations

from collections.abc import Container

from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, invalid


def choose(config: ServerConfig, name: str | None, tasks: Container[str], does: str) -> int:
    """The number of a model of one of these `tasks`. `does`: what the endpoint asks of it, such as "embed texts".

    404 for a name that is not served; 400 for a model of another kind, naming those that would fit.
    """
    fitting = [number for number, model in enumerate(config.models) if model.task in tasks]
    if name:
        number = named(config, name)
        if number not in fitting:
            raise invalid(f"The model '{config.models[number].names[0]}' does not {does}; {_those(config, fitting)}.", "model")
        return number
    if len(fitting) == 1:
        return fitting[0]
    if not fitting:
        raise invalid(f"This server has no model that can {does}.", "model")
    raise invalid(f"The parameter 'model' is required, as several models of this server {does}: "
                  f"{_names(config, fitting)}.", "model")


def named(config: ServerConfig, name: str) -> int:
    """The number of the model with this name; 404 where there is none."""
    for number, model in enumerate(config.models):
        if name in model.names:
            return number
    raise QuartetError("model_not_found", f"The model '{name[:100]}' does not exist.", "model")


def check_length(model: ModelConfig, truncate: int | None) -> None:
    """QuartetError for a `truncate_prompt_tokens` beyond the model's context."""
    if truncate is not None and not (truncate == -1 or 1 <= truncate <= model.max_model_len):
        raise invalid(f"'truncate_prompt_tokens' must be -1 or between 1 and {model.max_model_len}.",
                      "truncate_prompt_tokens")


def _those(config: ServerConfig, fitting: list[int]) -> str:
    if not fitting:
        return "no model of this server does"
    return f"{'this served model does' if len(fitting) == 1 else 'these served models do'}: {_names(config, fitting)}"


def _names(config: ServerConfig, numbers: list[int]) -> str:
    return ", ".join(f"'{config.models[number].names[0]}'" for number in numbers)
