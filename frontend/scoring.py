"""POST /score and /rerank: pairs of texts, scored by whatever kind of model is served.

A cross-encoder gets each pair as one input; an embedding model each text once, and the score is the cosine of two
vectors; a late-interaction model gives vectors per token, and the score is the sum of each query token's best match.
Run by the frontend.
"""
from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from frontend.bodies import parse_object, validate
from frontend.choose import choose
from frontend.numbers import dump
from frontend.pool_answers import Answer, usage
from frontend.pool_params import PoolAsk, activation, make_spec, prompted
from frontend.pool_schema import RerankBody, ScoreBody, Scored
from frontend.pools import PoolRequest
from frontend.stages import Stages
from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, invalid, unsupported
from pipeline.messages import Chat, PoolText
from pipeline.params import PoolParams

OTHER_NAMES = (("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
SLICE = 2**20                        # multiplications between two turns of the loop


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreAsk(PoolAsk):
    """Pair k is texts first[k] and second[k]; `inputs` of embedding models are the texts, of cross-encoders the pairs."""

    pairs: Sequence[tuple[int, int]]     # inputs that pair k compares; () where each input is a pair
    documents: Sequence[str] = ()        # /rerank: the documents
    top_n: int = 0                       # /rerank: 0: all
    show: bool = False                   # /rerank: show the documents


def score(content: bytes, config: ServerConfig, stages: Stages) -> ScoreAsk:
    raw = parse_object(content)
    names = ("text_1", "text_2")
    for other in OTHER_NAMES:
        if all(name in raw for name in other):
            raw = {**raw, "text_1": raw[other[0]], "text_2": raw[other[1]]}
            names = other
            break
    body = validate(ScoreBody, raw)
    first, second = body.text_1, body.text_2
    many = isinstance(first, list) and len(first) > 1
    left = first if isinstance(first, list) else [first]
    right = second if isinstance(second, list) else [second]
    if many and len(left) != len(right):
        raise invalid(f"'{names[0]}' must be one text, or as many as '{names[1]}': it has {len(left)}, and '{names[1]}' "
                      f"has {len(right)}.", names[0])
    return _ask(body, config, stages, left, right, names if many else (names[0], names[1]))


def rerank(content: bytes, config: ServerConfig, stages: Stages) -> ScoreAsk:
    body = validate(RerankBody, parse_object(content))
    if body.rank_fields not in (None, [], ["text"]):
        raise unsupported("rank_fields")
    documents = body.documents if isinstance(body.documents, list) else [body.documents]
    return _ask(body, config, stages, [body.query], documents, ("query", "documents"), documents=documents,
                top_n=body.top_n or 0, show=body.return_documents is not False)


def _ask(body: Scored, config: ServerConfig, stages: Stages, left: Sequence[str], right: Sequence[str],
         names: tuple[str, str], **more: Any) -> ScoreAsk:
    number = choose(config, body.model, ("score", "embed"), "score pairs of texts")
    model, facts = config.models[number], stages.facts(number)
    activate = activation(body, body.softmax, body.activation)
    chat = _template_input(body, model)
    for name, value in (("max_tokens_per_query", body.max_tokens_per_query), ("max_tokens_per_doc", body.max_tokens_per_doc)):
        if value is not None and value >= model.max_model_len:
            raise invalid(f"'{name}' must be below {model.max_model_len}, the context length of the model.", name)
    keep = body.max_tokens_per_query or 0, body.max_tokens_per_doc or 0
    if model.task == "score":
        inputs, pairs, name_of = _crossed(left, right, keep, names, chat)
        params = PoolParams("score", activate)
    else:
        if activate is not None and not activate:
            raise invalid("'use_activation' false has no meaning for an embedding model, whose scores are cosines.",
                          "use_activation")
        inputs, pairs, name_of = _apart(model, left, right, keep, names)
        params = PoolParams("token_embed" if _late(facts) else "embed", True)
    spec = make_spec(body, config, number, inputs, params, True, name_of)
    return ScoreAsk(spec=spec, model=model.names[0], label=body.request_id, pairs=pairs, **more)


def _late(facts: Mapping[str, Any]) -> bool:
    return facts.get("late_interaction") is True


def _template_input(body: Scored, model: ModelConfig) -> Chat | None:
    """What the template of a model that scores two texts as one chat gets besides them; None for any other model."""
    kwargs = dict(body.chat_template_kwargs or {})
    if body.instruction is not None:
        kwargs["instruction"] = body.instruction
    if model.pair_template:
        return Chat(messages_json=b"", kwargs_json=json.dumps(kwargs).encode() if kwargs else b"")
    for name in ("instruction", "chat_template_kwargs"):
        if getattr(body, name):
            raise QuartetError("unsupported_parameter", f"The parameter '{name}' is for models that score two texts through "
                                                        f"a template, and '{model.names[0]}' has none.", name)
    return None


def _crossed(left: Sequence[str], right: Sequence[str], keep: tuple[int, int], names: tuple[str, str],
             chat: Chat | None) -> Any:
    """Each pair as one input."""
    inputs = [PoolText(k, text=left[k if len(left) > 1 else 0], pair=text, keep=keep[0], keep_pair=keep[1], chat=chat)
              for k, text in enumerate(right)]
    return inputs, (), lambda k: f"{names[1]}[{k}]" if len(right) > 1 else names[1]


def _apart(model: ModelConfig, left: Sequence[str], right: Sequence[str], keep: tuple[int, int],
           names: tuple[str, str]) -> Any:
    """Each text once, the left ones first."""
    ahead = prompted(model, "query" if "query" in model.prompts else "")
    behind = prompted(model, next((name for name in DOCUMENT_PROMPTS if name in model.prompts), ""))
    count = len(left)
    leads = (0, 0) if model.include_prompt else (len(ahead), len(behind))
    inputs = [PoolText(i, text=ahead + text, keep=keep[0], lead=leads[0]) for i, text in enumerate(left)]
    inputs += [PoolText(count + i, text=behind + text, keep=keep[1], lead=leads[1]) for i, text in enumerate(right)]
    pairs = [(k if count > 1 else 0, count + k) for k in range(len(right))]

    def name_of(i: int) -> str:
        name, place, size = (names[0], i, count) if i < count else (names[1], i - count, len(right))
        return f"{name}[{place}]" if size > 1 else name
    return inputs, pairs, name_of


async def scores(ask: ScoreAsk, request: PoolRequest) -> list[np.float32]:
    """The score of each pair."""
    results = request.results()
    if not ask.pairs:
        return [rows[0, 0] for rows in results]
    if ask.spec.params.task == "embed":
        return [np.float32(_cosine(results[a][0], results[b][0])) for a, b in ask.pairs]
    found, work = [], 0
    for a, b in ask.pairs:
        work += results[a].size * len(results[b])
        if work > SLICE:
            work = 0
            await asyncio.sleep(0)
        found.append(np.float32((results[a] @ results[b].T).max(axis=1).sum()))
    return found


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    """In float64, from vectors of any length."""
    x, y = a.astype(np.float64), b.astype(np.float64)
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size else 0.0


async def score_answer(ask: ScoreAsk, request: PoolRequest, head: dict[str, Any]) -> Answer:
    data = [{"index": k, "object": "score", "score": value} for k, value in enumerate(await scores(ask, request))]
    return Answer(dump({**head, "data": data, "usage": usage(request.prompt_tokens)}))


async def rerank_answer(ask: ScoreAsk, request: PoolRequest, head: dict[str, Any]) -> Answer:
    """Jina's shape, with the fields of Cohere's v1 and v2 beside them; the best document first."""
    found = await scores(ask, request)
    order = sorted(range(len(found)), key=lambda k: (-float(found[k]), k))[:ask.top_n or None]
    results: list[dict[str, Any]] = []
    for k in order:
        result: dict[str, Any] = {"index": k}
        if ask.show:
            result["document"] = {"text": ask.documents[k]}
        result["relevance_score"] = found[k]
        results.append(result)
    tokens = request.prompt_tokens
    return Answer(dump({
        "id": head["id"], "model": head["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "results": results, "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}}}))
