"""Validated bodies of /v1/embeddings, /pooling and /classify to what the table computes and how the answer is written.

Everything that depends on the model is checked here, before the request costs anything. Run by the frontend; pure
functions of the body, the configuration and what the model's engine said about itself.
"""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from frontend.bodies import parse_object, validate
from frontend.choose import check_length, choose
from frontend.params import template_input
from frontend.pool_schema import (
    Classified,
    ClassifyBody,
    ClassifyChatBody,
    EmbeddingBody,
    EmbeddingChatBody,
    Encoded,
    FromInput,
    FromMessages,
    Pooled,
    PoolingBody,
    PoolingChatBody,
    Tasked,
)
from frontend.pools import PoolSpec
from frontend.schema import Templated
from frontend.stages import Stages
from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, invalid
from pipeline.messages import PoolText
from pipeline.params import PoolParams

TASKS = {"embed": ("embed", "token_embed"), "classify": ("classify", "token_classify"), "score": ("score", "classify")}
MAX_BYTES_INPUTS = 64                # with encoding_format bytes: each is described in a header


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How numbers are written."""

    encoding: str = "float"              # float | base64 | bytes | bytes_only
    dtype: str = "float32"
    endianness: str = "native"


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAsk:
    """A request as its handler sees it."""

    spec: PoolSpec
    model: str                           # the served name that answers carry
    label: str | None                    # the caller's own id, from the body
    form: Form = Form()
    labels: Sequence[str | None] = ()    # names of the classes


def embedding(content: bytes, config: ServerConfig, stages: Stages) -> PoolAsk:
    raw = parse_object(content)
    body = validate(EmbeddingChatBody if "messages" in raw else EmbeddingBody, raw)
    number = choose(config, body.model, ("embed",), "embed texts")
    return _ask(body, raw, config, stages, number, "embed", body.normalize)


def pooling(content: bytes, config: ServerConfig, stages: Stages) -> PoolAsk:
    raw = parse_object(content)
    schema: type[Tasked] = PoolingChatBody if "messages" in raw else PoolingBody
    body = validate(schema, raw)
    number = choose(config, body.model, TASKS, "give vectors or class scores")
    task = body.task or config.models[number].task
    check_task(config.models[number], stages.facts(number), task)
    return _ask(body, raw, config, stages, number, task, body.normalize, body.softmax, body.activation)


def classify(content: bytes, config: ServerConfig, stages: Stages) -> PoolAsk:
    raw = parse_object(content)
    body = validate(ClassifyChatBody if "messages" in raw else ClassifyBody, raw)
    number = choose(config, body.model, ("classify", "score"), "classify texts")
    return _ask(body, raw, config, stages, number, "classify", body.softmax, body.activation)


def _ask(body: Any, raw: dict[str, Any], config: ServerConfig, stages: Stages, number: int, task: str,
         *aliases: bool | None) -> PoolAsk:
    model, facts = config.models[number], stages.facts(number)
    inputs = _from_input(body, config, number) if isinstance(body, FromInput) else _from_messages(body, raw, config)
    form = _form(body, len(inputs)) if isinstance(body, Encoded) else Form()
    dimensions = body.dimensions or 0 if isinstance(body, Encoded) else 0
    if dimensions:
        check_dimensions(facts, task, dimensions)
    special = isinstance(body, FromInput) if body.add_special_tokens is None else body.add_special_tokens
    alone = len(inputs) == 1
    what = "input" if isinstance(body, FromInput) else "messages"
    spec = make_spec(body, config, number, inputs, PoolParams(task, activation(body, *aliases), dimensions),
                     special, lambda i: what if alone else f"{what}[{i}]")
    labels = facts.get("labels")
    return PoolAsk(spec=spec, model=model.names[0], label=body.request_id, form=form,
                   labels=labels if isinstance(labels, list) else ())


def make_spec(body: Pooled, config: ServerConfig, number: int, inputs: list[PoolText], params: PoolParams,
              add_special: bool, name_of: Any) -> PoolSpec:
    """What every pooling request asks of the table."""
    model = config.models[number]
    check_length(model, body.truncate_prompt_tokens)
    if body.priority and model.engine.scheduling_policy != "priority":
        raise QuartetError("unsupported_parameter", "The parameter 'priority' needs a server that was started with "
                                                    "--scheduling-policy priority.", "priority")
    truncate = body.truncate_prompt_tokens
    if truncate is None and model.long_inputs == "truncate":
        truncate = -1
    return PoolSpec(
        model=number, inputs=inputs, params=params, add_special=add_special, truncate=truncate,
        truncate_left=body.truncation_side == "left", priority=body.priority or 0, name_of=name_of,
        longest=model.max_embed_len if truncate is None and params.task == "embed" else 0,
        deadline_ns=time.monotonic_ns() + int(config.http.request_timeout_s * 1e9))


def activation(body: Pooled | Classified, *aliases: bool | None) -> bool | None:
    """use_activation under any of its names; QuartetError where they contradict each other."""
    values = {value for value in (body.use_activation, *aliases) if value is not None}
    if len(values) > 1:
        raise invalid("'use_activation' and its other names contradict each other.", "use_activation")
    return values.pop() if values else None


def check_task(model: ModelConfig, facts: Mapping[str, Any], task: str) -> None:
    known = facts.get("tasks")
    known = known if isinstance(known, list) else TASKS[model.task]
    if task not in known:
        raise invalid(f"The model '{model.names[0]}' does not do '{task}', but {', '.join(map(repr, known))}.", "task")


def check_dimensions(facts: Mapping[str, Any], task: str, wanted: int) -> None:
    """QuartetError where the model's embeddings cannot be cut, or not to that size."""
    if task not in ("embed", "token_embed"):
        raise invalid("'dimensions' is for embeddings only.", "dimensions")
    size, sizes = facts.get("dimension"), facts.get("matryoshka")
    if not isinstance(size, int):
        return                                               # the engine has not said yet; it checks again
    if wanted > size or (isinstance(sizes, list) and sizes and wanted not in sizes and wanted != size):
        allowed = f"one of {', '.join(map(str, sizes))}" if isinstance(sizes, list) and sizes else f"between 1 and {size}"
        raise invalid(f"'dimensions' must be {allowed} for this model.", "dimensions")
    if wanted < size and not isinstance(sizes, list):
        raise invalid(f"This model's embeddings have {size} dimensions and cannot be cut: leave out 'dimensions'.",
                      "dimensions")


def prompted(model: ModelConfig, name: str) -> str:
    """The text that goes ahead of each input: the model's prompt of this name ("" is its default)."""
    return model.prompts.get(name or model.default_prompt, "")


def _from_input(body: Any, config: ServerConfig, number: int) -> list[PoolText]:
    model = config.models[number]
    name = body.prompt_name if isinstance(body, Encoded) else None
    if name is not None and name not in model.prompts:
        known = f"it has {', '.join(map(repr, model.prompts))}" if model.prompts else "it has none"
        raise invalid(f"The model '{model.names[0]}' has no prompt of this name; {known}.", "prompt_name")
    if isinstance(body.input[0], bytes):
        if name is not None:
            raise invalid("'prompt_name' is for texts, not for token ids.", "prompt_name")
        return [PoolText(i, ids=ids) for i, ids in enumerate(body.input)]
    prompt = prompted(model, name or "") if isinstance(body, Encoded) else ""
    lead = 0 if model.include_prompt else len(prompt)
    return [PoolText(i, text=prompt + text, lead=lead) for i, text in enumerate(body.input)]


def _from_messages(body: FromMessages, raw: dict[str, Any], config: ServerConfig) -> list[PoolText]:
    if getattr(body, "prompt_name", None) is not None:
        raise invalid("'prompt_name' is for texts, not for chats.", "prompt_name")
    chats = body.messages if isinstance(body.messages[0], list) else [body.messages]
    shared: dict[str, Any] = {key: raw[key] for key in ("chat_template", "chat_template_kwargs", "continue_final_message")
                              if key in raw}
    texts = []
    for i, chat in enumerate(chats):
        one = {**shared, "messages": chat, "add_generation_prompt": bool(body.add_generation_prompt)}
        texts.append(PoolText(i, chat=template_input(validate(Templated, one), one, config)))
    return texts


def _form(body: Encoded, count: int) -> Form:
    form = Form(encoding=body.encoding_format or "float", dtype=body.embed_dtype or "float32",
                endianness=body.endianness or "native")
    if form.encoding == "bytes" and count > MAX_BYTES_INPUTS:
        raise invalid(f"'encoding_format' bytes describes each input in a header, so that it takes at most "
                      f"{MAX_BYTES_INPUTS} inputs: use bytes_only for more.", "encoding_format")
    return form
