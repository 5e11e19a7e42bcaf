"""The bodies of answers made of numbers: embeddings, pooled data, classes.

Written in slices, between which the loop turns: an answer may hold millions of numbers. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from frontend.numbers import SIZES, dump, encoded, raw
from frontend.pool_params import PoolAsk
from frontend.pools import PoolRequest

SLICE = 32_768                       # numbers written between two turns of the loop, about a millisecond
JSON, BINARY = "application/json", "application/octet-stream"


@dataclass(slots=True)
class Answer:
    body: bytes
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)


def usage(tokens: int) -> dict[str, Any]:
    return {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}


def identity(prefix: str, ask: PoolAsk, label: str, created: int) -> dict[str, Any]:
    """What an answer begins with."""
    return {"id": prefix + label, "object": "list", "created": created, "model": ask.model}


async def vectors(ask: PoolAsk, request: PoolRequest, head: dict[str, Any], kind: str) -> Answer:
    """`kind` embedding: a list of CreateEmbeddingResponse; pooling: the same with nested data."""
    form, results = ask.form, request.results()
    per_token = ask.spec.params.task.startswith("token_")
    rows = [r if per_token else r[0] for r in results]
    if form.encoding in ("bytes", "bytes_only"):
        return await _binary(ask, request, head, rows)
    key = "embedding" if kind == "embedding" else "data"
    parts = [dump(head)[:-1], b',"data":[']
    async for i, row in _slices(rows):
        value = dump(row) if form.encoding == "float" else b'"%b"' % encoded(row, form.dtype, form.endianness).encode()
        parts.append(b'%b{"index":%d,"object":"%b","%b":%b}' % (b"," if i else b"", i, kind.encode(), key.encode(), value))
    parts.append(b'],"usage":%b}' % dump(usage(request.prompt_tokens)))
    return Answer(b"".join(parts))


async def _binary(ask: PoolAsk, request: PoolRequest, head: dict[str, Any], rows: Sequence[np.ndarray]) -> Answer:
    """All elements in one body; with encoding_format bytes a header tells where each input's are."""
    form, start, told, parts = ask.form, 0, [], []
    async for i, row in _slices(rows):
        parts.append(raw(row, form.dtype, form.endianness))
        end = start + row.size * SIZES[form.dtype]
        told.append({"index": i, "embed_dtype": form.dtype, "endianness": form.endianness, "start": start, "end": end,
                     "shape": list(row.shape)})
        start = end
    answer = Answer(b"".join(parts), BINARY)
    if form.encoding == "bytes":
        tokens = request.prompt_tokens
        answer.headers["metadata"] = json.dumps({
            "id": head["id"], "created": head["created"], "model": head["model"], "data": told,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens}})
    return answer


async def classes(ask: PoolAsk, request: PoolRequest, head: dict[str, Any]) -> Answer:
    """The answer of /classify."""
    data = []
    async for i, row in _slices([r[0] for r in request.results()]):
        best = int(row.argmax())
        label = ask.labels[best] if best < len(ask.labels) else None
        data.append({"index": i, "label": label, "probs": row, "num_classes": len(row)})
    return Answer(dump({**head, "data": data, "usage": usage(request.prompt_tokens)}))


async def _slices(rows: Sequence[np.ndarray]) -> AsyncIterator[tuple[int, np.ndarray]]:
    """The rows with their numbers; now and then the loop turns."""
    size = 0
    for i, row in enumerate(rows):
        size += row.size
        if size > SLICE:
            size = 0
            await asyncio.sleep(0)
        yield i, row
