"""The protocol of the in-cluster client: what a `pipeline.client` and a frontend's ROUTER say to each other.

A registry of its own: clients never see the sockets or messages between stages. Bodies are the JSON of the HTTP API,
so that one schema checks both; streamed output comes as small records, many to a message, with token ids as arrays.
Credit: the frontend sends at most as many `Chunks` per call as it was granted, and merges text meanwhile. Lease: a
client that has been silent for `lease_ms` is gone, and its work is aborted.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.codec import Codec
from pipeline.schema import i64, u16, u32

PROTOCOL = 1
LEASE_MS = 10_000
PING_MS = 2_000
CREDIT = 32                       # Chunks messages of one call that may be on their way
MAX_CALLS = 4096                  # open calls of one client


@dataclass(slots=True)
class Hello:
    """client -> frontend, first of all and after a Reset."""

    protocol: u16
    client: str                   # a label for the log
    key: str                      # API key, "" for none


@dataclass(slots=True)
class Welcome:
    lease_ms: u32
    models: list[str]
    version: str


@dataclass(slots=True)
class Call:
    """client -> frontend. `op`: chat, completions, tokenize, detokenize, embeddings, pooling, classify, score, rerank, models
    or health."""

    cid: u32                      # the client's own number, fresh per call
    op: str
    body_json: bytes
    stream: bool = False
    request_id: str = ""          # a label, as X-Request-Id


@dataclass(slots=True)
class Cancel:
    cid: u32


@dataclass(slots=True)
class Credit:
    """client -> frontend: `add` more Chunks messages of a call may come."""

    cid: u32
    add: u16


@dataclass(slots=True)
class Ping:
    number: u32


@dataclass(slots=True)
class Pong:
    number: u32


@dataclass(slots=True)
class Reset:
    """frontend -> client: it knows no such client (it is new, or the lease ran out); every call is lost."""

    reason: str


@dataclass(slots=True)
class Reply:
    """frontend -> client: the whole answer of a call, or its error (status >= 400), as the JSON of the HTTP API."""

    cid: u32
    status: u16
    body_json: bytes


@dataclass(slots=True)
class Chunk:
    """A piece of one choice."""

    cid: u32
    index: u16
    text: str
    ids: bytes                    # uint32
    finish: str | None = None     # OpenAI's finish_reason
    stop: str | i64 | None = None
    logprobs_json: bytes = b""    # as in the HTTP API
    deltas_json: bytes = b""      # chat with tools or reasoning: a list of deltas as in the HTTP API, behind text


@dataclass(slots=True)
class Chunks:
    items: list[Chunk] = field(default_factory=list)


@dataclass(slots=True)
class End:
    """frontend -> client: a streamed call is complete."""

    cid: u32
    usage_json: bytes


@dataclass(slots=True)
class Vectors:
    """frontend -> client: the whole answer of embeddings or pooling, numbers as they are."""

    cid: u32
    rows: bytes                   # uint32 per input: rows of `data`
    data: np.ndarray              # float32 [sum(rows), D]
    usage_json: bytes


REGISTRY: dict[int, type] = {1: Hello, 2: Welcome, 3: Call, 4: Cancel, 5: Credit, 6: Ping, 7: Pong, 8: Reset, 9: Reply,
                             10: Chunks, 11: End, 12: Vectors}
_CODEC = Codec(REGISTRY, (Chunk,))
encode, decode = _CODEC.encode, _CODEC.decode
