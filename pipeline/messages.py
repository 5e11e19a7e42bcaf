"""Every message and record that crosses a socket between stages: the closed registry of types.

Positional arrays ``[type, field, ...]``; fields are appended only, with defaults; numbers are never reused. Token ids
travel as bytes of little-endian uint32 (`pack_ids`). Which socket carries which message: docs/structures.md.
"""
from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from pipeline.params import Beam, DetokSpec, Grammar, PoolParams, Repetition, SamplingParams, SpeechParams, Thinking
from pipeline.schema import i64, u8, u16, u32, u64

PROTOCOL = 1
TOKEN_ROW = struct.Struct("<QII")       # rid, start and id of a TokenOut that has one id and nothing else
TEXT_ROW = struct.Struct("<QIIII")      # rid, offset and start of a TextDelta, where its ids and its text end in the message
assert sys.byteorder == "little" and array("I").itemsize == 4


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian uint32; OverflowError for anything outside."""
    return (ids if isinstance(ids, array) and ids.typecode == "I" else array("I", ids)).tobytes()


def unpack_ids(data: bytes) -> array[int]:
    """The inverse of pack_ids; ValueError when the length is no multiple of 4."""
    return array("I", data)


def pack_rids(rids: Iterable[int]) -> bytes:
    return array("Q", rids).tobytes()


def unpack_rids(data: bytes) -> array[int]:
    rids = array("Q")
    rids.frombytes(data)
    return rids


class Kind(IntEnum):
    """The kinds of stage, in the order in which a drain stops them."""

    FRONTEND = 0
    TOKENIZER = 1
    ENGINE = 2
    DETOKENIZER = 3
    LAUNCHER = 4


class State(IntEnum):
    STARTING = 0
    READY = 1
    DRAINING = 2


class Finish(IntEnum):
    """Why a choice ended; RUNNING while it goes on."""

    RUNNING = 0
    EOS = 1
    STOP_ID = 2
    STOP_STRING = 3
    LENGTH = 4
    ABORT = 5
    ERROR = 6
    REPETITION = 7
    COMPLETE = 8                        # the grammar of the output allows nothing more


class AbortReason(IntEnum):
    CLIENT_GONE = 0
    SLOW_CLIENT = 1
    DEADLINE = 2
    SHUTDOWN = 3
    STAGE_LOST = 4
    ORPHAN = 5
    ERROR = 6


# ---- records inside messages -------------------------------------------------------------------------------------

@dataclass(slots=True)
class Route:
    """Which process serves a submission: index and epoch of each stage. A record for an older epoch is dropped."""

    tokenizer: u16
    tokenizer_epoch: u32
    engine: u16
    engine_epoch: u32
    detok: u16
    detok_epoch: u32


@dataclass(slots=True)
class Chat:
    """What a chat template needs; the JSON is opaque to everyone but the tokenizer."""

    messages_json: bytes
    tools_json: bytes = b""
    kwargs_json: bytes = b""            # chat_template_kwargs
    template: str | None = None         # a request's own template, where trusted
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    documents_json: bytes = b""


@dataclass(slots=True)
class Usage:
    prompt_tokens: u32
    cached_tokens: u32
    completion_tokens: u32


@dataclass(slots=True)
class Logprobs:
    """Log-probabilities of n tokens, each with its k best. The detokenizer adds the token's bytes."""

    k: u32                              # entries per token in top_*
    values: bytes                       # float32 [n]; NaN where there is none (first prompt token)
    ranks: bytes                        # uint32 [n], 1 = the best
    top_ids: bytes                      # uint32 [n, k], best first
    top_values: bytes                   # float32 [n, k]
    tokens: list[bytes] = field(default_factory=list)      # [n], filled by the detokenizer
    top_tokens: list[bytes] = field(default_factory=list)  # [n * k], filled by the detokenizer


@dataclass(slots=True)
class Add:
    """tokenizer -> engine: n choices of one prompt. Child j of `rid` is choice `choice + j`.

    `history` is the output so far of a continuation: prompt for the KV cache, output for everything else.
    """

    rid: u64
    route: Route
    n: u8
    choice: u8
    ids: bytes                          # uint32, the prompt
    history: bytes                      # uint32
    sampling: SamplingParams
    detok: DetokSpec
    deadline_ns: u64                    # monotonic; 0: none
    priority: i64
    salt: bytes                         # separates prefix caches
    alone: bool = False                 # run with no neighbour: its engine died under it twice
    embeds: np.ndarray | None = None    # [prompt, hidden]: the prompt is these rows; `ids` are zeros then


@dataclass(slots=True)
class Open:
    """engine -> detokenizer: a new choice, ahead of its first ids."""

    rid: u64
    spec: DetokSpec
    left: bytes                         # uint32: the last few prompt ids (the whole prompt with echo or prompt logprobs)
    history: bytes                      # uint32: replayed silently


@dataclass(slots=True)
class TokenOut:
    """engine -> detokenizer: what one step gave one choice. A finish other than RUNNING closes its entry."""

    rid: u64
    start: u32                          # index of the first id among the choice's output ids
    ids: bytes                          # uint32, may be empty
    finish: u8 = 0
    stop_id: i64 | None = None          # with Finish.STOP_ID
    logprobs: Logprobs | None = None    # of `ids`
    prompt_logprobs: Logprobs | None = None
    usage: Usage | None = None          # with the first ids and with the finish


@dataclass(slots=True)
class Span:
    """What the next `chars` characters of a delta's text are: a families.parts.Part."""

    kind: u8
    chars: u32


@dataclass(slots=True)
class TextDelta:
    """detokenizer -> frontend: text that follows `offset` characters, and the ids that it came from.

    With a parser the text is what the parser made of the output (names and arguments of calls, reasoning, content),
    and `spans` covers it; without one it is the output itself and there are no spans.
    """

    rid: u64
    offset: u32                         # characters sent before
    text: str
    start: u32                          # output ids sent before
    ids: bytes                          # uint32
    finish: u8 = 0
    stop: str | i64 | None = None       # the stop string or stop id that ended it
    logprobs: Logprobs | None = None
    prompt_text: str | None = None      # with echo: ahead of the first text
    prompt_logprobs: Logprobs | None = None
    usage: Usage | None = None
    spans: list[Span] = field(default_factory=list)
    reasoning_tokens: u32 = 0           # of the choice so far
    open_call: bool = False             # with the finish: the last call's arguments are not complete


@dataclass(slots=True)
class AdmittedItem:
    rid: u64                            # the family: from here on the tokenizer holds nothing of it
    ids: bytes                          # uint32, the prompt


@dataclass(slots=True)
class FailedItem:
    rid: u64                            # a child, or the family for all of its children
    code: str                           # of errors.CATALOGUE
    message: str                        # safe to show
    param: str | None = None


@dataclass(slots=True)
class PoolText:
    """One input of a pooling request on its way to the tokenizer: exactly one of `text`, `chat`, `ids`.

    With `text`, `pair` and `chat` it is two texts that a template joins; the chat then has variables and no messages.
    """

    index: u32                          # among the request's inputs
    text: str | None = None
    pair: str | None = None             # a cross-encoder's second text
    chat: Chat | None = None
    ids: bytes = b""                    # uint32
    keep: u32 = 0                       # cut `text` to so many tokens; 0: as it is
    keep_pair: u32 = 0                  # the same for `pair`
    lead: u32 = 0                       # characters at the beginning of `text` whose tokens are not pooled


@dataclass(slots=True)
class PoolInput:
    """One input as ids."""

    index: u32
    ids: bytes                          # uint32, special tokens included
    type_ids: bytes = b""               # uint8 per id, where the model tells two texts apart; empty: all 0
    parts: bytes = b""                  # uint32: lengths of stretches that are computed apart; empty: it is one
    skip: u32 = 0                       # ids at the beginning that are not pooled


@dataclass(slots=True)
class PoolAdd:
    """tokenizer -> engine: a slice of a request's inputs. Slices of one request share its rid."""

    rid: u64
    route: Route
    inputs: list[PoolInput]
    params: PoolParams
    deadline_ns: u64
    priority: i64 = 0
    total: u32 = 0                      # inputs of the submission over all of its slices; 0: those of this slice
    alone: bool = False                 # in no batch with another request: its engine died twice under it


@dataclass(slots=True)
class AudioWindow:
    """A stretch of a recording, at most thirty seconds, cut where it is quiet."""

    index: u32                          # among the recording's windows
    last: bool                          # no window follows
    start_s: float                      # in the recording
    seconds: float                      # of sound; features may be padded
    features: np.ndarray                # float32: what the model's encoder takes ([mels, frames], or [samples])


@dataclass(slots=True)
class SpeechWord:
    start_s: float
    end_s: float
    text: str                           # with the space in front of it
    probability: float


@dataclass(slots=True)
class SpeechSegment:
    """What is said in a stretch of the recording; times from its beginning."""

    start_s: float
    end_s: float
    text: str
    ids: bytes                          # uint32, timestamps included where the model gives them
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    words: list[SpeechWord] = field(default_factory=list)


@dataclass(slots=True)
class Load:
    """An engine's load, as its beacon tells it."""

    running: u32 = 0
    waiting: u32 = 0
    waiting_tokens: u64 = 0
    kv_used: u32 = 0                    # blocks
    kv_total: u32 = 0                   # blocks
    outstanding_bytes: u64 = 0          # tokenizers: bytes of text waiting


@dataclass(slots=True)
class MetricSample:
    name: str
    labels: list[str]                   # name, value, name, value ...
    value: float


@dataclass(slots=True)
class MetricFamily:
    name: str
    type: str
    help: str
    samples: list[MetricSample]


# ---- messages ----------------------------------------------------------------------------------------------------

@dataclass(slots=True)
class Submit:
    """frontend -> tokenizer: one prompt with n choices. Exactly one of `text`, `chat`, `ids` is the prompt."""

    rid: u64
    route: Route
    model: u8                           # index into ServerConfig.models
    n: u8
    choice: u8                          # number of the first choice (continuations carry one choice)
    text: str | None
    chat: Chat | None
    ids: bytes                          # uint32
    history: bytes                      # uint32
    add_special: bool
    truncate: i64 | None                # keep the last N prompt tokens; -1: what the context allows
    sampling: SamplingParams
    detok: DetokSpec
    deadline_ns: u64
    priority: i64 = 0
    salt: bytes = b""
    alone: bool = False
    truncate_right: bool = False        # cut the end of the prompt, not its beginning
    suffix: str | None = None           # fill-in-the-middle: `text` is what comes before the answer, this what follows
    embeds: np.ndarray | None = None    # [tokens, hidden]: the prompt, in place of a text, a chat or ids


@dataclass(slots=True)
class SubmitPool:
    """frontend -> tokenizer: inputs that become vectors. Handed on in slices once all of them are found to be good."""

    rid: u64
    route: Route                        # detok is not used
    model: u8
    inputs: list[PoolText]
    params: PoolParams
    add_special: bool
    truncate: i64 | None                # keep N tokens; -1: what the context allows; None: longer is an error
    truncate_left: bool                 # cut the beginning, not the end
    deadline_ns: u64
    priority: i64 = 0
    alone: bool = False
    longest: u32 = 0                    # tokens of an input that is computed in parts; 0: there are none


@dataclass(slots=True)
class TokenizeQuery:
    """frontend -> tokenizer: POST /tokenize. Exactly one of `text` and `chat`."""

    rid: u64
    tokenizer_epoch: u32
    model: u8
    text: str | None
    chat: Chat | None
    add_special: bool
    want_strings: bool


@dataclass(slots=True)
class DetokenizeQuery:
    rid: u64
    tokenizer_epoch: u32
    model: u8
    ids: bytes


@dataclass(slots=True)
class TokenizeAnswer:
    """tokenizer -> frontend."""

    rid: u64
    ids: bytes
    strings: list[str] | None


@dataclass(slots=True)
class DetokenizeAnswer:
    rid: u64
    text: str


@dataclass(slots=True)
class Abort:
    """frontend -> tokenizer (data pipe) and -> engine (control socket). A family id covers its children."""

    rids: bytes                         # uint64
    reason: u8


@dataclass(slots=True)
class StopHit:
    """detokenizer -> engine (control socket): a stop string ended the choice after `n_tokens` output tokens."""

    rid: u64
    n_tokens: u32


@dataclass(slots=True)
class Adds:
    items: list[Add]


@dataclass(slots=True)
class PoolAdds:
    items: list[PoolAdd]


@dataclass(slots=True)
class PoolHanded:
    """tokenizer -> frontend: every slice of a submission is on its way to the engine."""

    tokenizer: u16
    tokenizer_epoch: u32
    rid: u64


@dataclass(slots=True)
class Pooled:
    """engine -> frontend: results of some inputs of one request, in any order; every input comes exactly once."""

    engine: u16
    engine_epoch: u32
    rid: u64
    indices: bytes                      # uint32 [n]
    lengths: bytes                      # uint32 [n]: tokens of each input, as the model saw them
    rows: bytes                         # uint32 [n]: rows of `data` of each input (1, or one per token)
    data: np.ndarray                    # float32 [sum(rows), D]: vectors, or D class scores


@dataclass(slots=True)
class SubmitAudio:
    """frontend -> tokenizer: a recording in a file of the run directory, which the frontend deletes in the end."""

    rid: u64
    route: Route                        # detok is not used
    model: u8
    path: str
    params: SpeechParams
    credit: u32                         # windows below this number may be handed to the engine
    done: bytes                         # uint32: windows whose results are there already
    deadline_ns: u64
    priority: i64 = 0
    alone: bool = False


@dataclass(slots=True)
class AudioCredit:
    """frontend -> tokenizer: results have come, windows below `credit` may be handed to the engine."""

    rid: u64
    tokenizer_epoch: u32
    credit: u32


@dataclass(slots=True)
class SpeechAdd:
    """tokenizer -> engine: one window of a recording. Windows of one recording share its rid."""

    rid: u64
    route: Route
    params: SpeechParams
    window: AudioWindow
    done: bytes                         # as in SubmitAudio
    deadline_ns: u64
    priority: i64 = 0
    alone: bool = False


@dataclass(slots=True)
class Transcribed:
    """engine -> frontend: what is said in one window. Windows come in any order, each exactly once."""

    engine: u16
    engine_epoch: u32
    rid: u64
    index: u32
    last: bool
    start_s: float
    seconds: float
    language: str                       # spoken; empty where the model knows one language only
    tokens: u32                         # decoded for it
    segments: list[SpeechSegment]


@dataclass(slots=True)
class StepOut:
    """engine -> detokenizer, one per step and detokenizer: opens first, then rows, then items."""

    engine: u16
    engine_epoch: u32
    detok_epoch: u32                    # whom it is meant for
    opens: list[Open]
    items: list[TokenOut]
    rows: bytes = b""                   # TOKEN_ROW each: choices that gained an id and nothing else, nearly all of a step


@dataclass(slots=True)
class Deltas:
    """detokenizer -> frontend, one per wake-up and frontend."""

    detok: u16
    detok_epoch: u32
    items: list[TextDelta]
    rows: bytes = b""                   # TEXT_ROW each: choices that gained ids and text and nothing else
    ids: bytes = b""                    # uint32: of the rows, one after the other
    text: str = ""                      # of the rows, one after the other


@dataclass(slots=True)
class Admitted:
    """engine -> frontend, one per step and frontend."""

    engine: u16
    engine_epoch: u32
    items: list[AdmittedItem]


@dataclass(slots=True)
class Failed:
    """any stage -> frontend: these requests end with an error."""

    kind: u8
    index: u16
    epoch: u32
    items: list[FailedItem]


@dataclass(slots=True)
class Census:
    """engine -> frontend, every 5 s: the ids of that frontend that the engine holds."""

    engine: u16
    engine_epoch: u32
    rids: bytes                         # uint64


@dataclass(slots=True)
class Beacon:
    """every stage -> PUB: see pipeline.beacon."""

    protocol: u16
    kind: u8
    index: u16
    epoch: u32
    pid: u32
    state: u8
    phase: str                          # while starting: what it is doing
    percent: u8
    tick: u64                           # turns of the main loop
    tick_age_ms: u64                    # since the last turn
    pending: bool                       # there is work for the loop
    load: Load
    facts_json: bytes = b""             # engines: what the loaded model turned out to be


@dataclass(slots=True)
class Metrics:
    """every stage -> PUB, once a second under a topic of its own: a snapshot of its metrics."""

    kind: u8
    index: u16
    epoch: u32
    families: list[MetricFamily]


@dataclass(slots=True)
class Tensor:
    """An ndarray with a request id; arrays of any size ride as extra frames."""

    rid: u64
    data: np.ndarray


# type number -> class. Append only. 20-29 text, 30-39 pooling, 40-49 speech.
REGISTRY: dict[int, type] = {
    1: Submit, 2: TokenizeQuery, 3: DetokenizeQuery, 4: TokenizeAnswer, 5: DetokenizeAnswer, 6: Abort, 7: StopHit,
    8: Adds, 9: StepOut, 10: Deltas, 11: Admitted, 12: Failed, 13: Census, 14: Beacon, 15: Tensor,
    16: Metrics, 30: SubmitPool, 31: PoolAdds, 32: Pooled, 33: PoolHanded,
    40: SubmitAudio, 41: AudioCredit, 42: SpeechAdd, 43: Transcribed,
}
RECORDS: tuple[type, ...] = (
    Route, Chat, Usage, Logprobs, Add, Open, TokenOut, TextDelta, AdmittedItem, FailedItem, Load, MetricSample,
    MetricFamily, SamplingParams, DetokSpec, Grammar, PoolParams, PoolText, PoolInput, PoolAdd, Span,
    Thinking, Repetition, Beam,
    SpeechParams, AudioWindow, SpeechWord, SpeechSegment,
)
