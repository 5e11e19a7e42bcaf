"""Fields that several bodies share, and the closed lists of fields that have no effect or no support.

A known field is honoured, refused by name, or listed in NO_EFFECT; unknown fields are ignored, as OpenAI's clients
expect. Run by the frontend; holds no state.
"""
from __future__ import annotations

import re
from collections.abc import Container, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from pipeline.errors import unsupported
from pipeline.params import (
    MAX_BAD_WORD_CHARS,
    MAX_BAD_WORDS,
    MAX_BIAS,
    MAX_LOGPROB_IDS,
    MAX_N,
    MAX_PATTERN,
    MAX_STOP_CHARS,
    MAX_STOP_IDS,
    MAX_STOPS,
)

MAX_PROMPTS = 1024                           # prompts of one request, and prompts x n
MAX_JSON_DEPTH = 64
REQUEST_ID = r"^[A-Za-z0-9._:-]{1,128}$"
REQUEST_ID_PATTERN = re.compile(REQUEST_ID + r"\Z")

# Accepted without effect; docs/api.md tells why of each.
NO_EFFECT = ("user", "store", "metadata", "service_tier", "prediction", "prompt_cache_key",
             "prompt_cache_retention", "safety_identifier", "session_id", "stream_options.include_obfuscation")


# Known and not supported: refused unless the value is null or one of those given here, which ask for nothing.
REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "audio", "chat_template_kwargs.chat_template", "chat_template_kwargs.tokenize",
        "ec_transfer_params", "grammar", "guided_decoding_backend", "json_schema", "kv_transfer_params",
        "media_io_kwargs", "mm_processor_kwargs", "regex", "structural_tag", "web_search_options"), ()),
    "mm_payload": ("tensors",), "return_mm_kwargs": (True,), "return_token_offsets": (False,),
    "prompt_embeds": ([],), "return_prompt_text": (False,), "suffix": (), "function_call": ("none",), "functions": ([],),
    "include_reasoning": (True,), "logits_processors": ([],), "parallel_tool_calls": (True,), "modalities": (["text"],),
    "routed_experts_prompt_start": (0,), "tool_choice": ("none",), "tools": ([],),
    "verbosity": ("medium",), "vllm_xargs": ({},), "watermarking": (False,),
}


def _asks_for_nothing(name: str, value: Any) -> bool:
    return value is None or any(value == allowed and type(value) is type(allowed) for allowed in REFUSED[name])


def refuse_unsupported(body: Mapping[str, Any], honoured: Container[str] = ()) -> None:
    """QuartetError unsupported_parameter for the first field that asks for something this server does not do.

    `honoured`: fields that this endpoint does honour.
    """
    for name in sorted(name for name in body.keys() & REFUSED.keys() if name not in honoured):
        if not _asks_for_nothing(name, body[name]):
            raise unsupported(name)
    kwargs = body.get("chat_template_kwargs")
    if isinstance(kwargs, dict):
        for path in (f"chat_template_kwargs.{name}" for name in kwargs):
            if path in REFUSED:
                raise unsupported(path)


class Body(BaseModel):
    """A request body: strict types ("5" and true are no integers), unknown fields ignored."""

    HONOURS: ClassVar[frozenset[str]] = frozenset()      # of REFUSED: what this endpoint does
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _negative_is_off(value: Any) -> Any:
    return 0 if type(value) is int and value == -1 else value


Temperature = Annotated[float, Field(ge=0, le=2)]
TopP = Annotated[float, Field(gt=0, le=1)]
TopK = Annotated[int, BeforeValidator(_negative_is_off), Field(ge=0, lt=2**31, description="0 or -1: off")]
MinP = Annotated[float, Field(ge=0, le=1)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
RepetitionPenalty = Annotated[float, Field(ge=0.01, le=100)]
Seed = Annotated[int, Field(ge=-2**63, lt=2**64, description="-1: unset")]
NumTokens = Annotated[int, Field(ge=0, lt=2**32)]
N = Annotated[int, Field(ge=1, le=MAX_N)]
TokenId = Annotated[int, Field(ge=0, lt=2**32)]
StopIds = Annotated[list[TokenId], Field(max_length=MAX_STOP_IDS)]
StopString = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARS)]
Stops = Annotated[list[StopString], BeforeValidator(_as_list, json_schema_input_type=str | list[StopString]),
                  Field(max_length=MAX_STOPS)]
IdString = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,10}$")]
Bias = Annotated[dict[IdString, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=MAX_BIAS)]
Truncate = Annotated[int, Field(ge=-1, lt=2**31, description="keep the last N prompt tokens; -1: what fits")]
AllowedIds = Annotated[list[TokenId], Field(min_length=1, description="nothing else is sampled")]
LogprobIds = Annotated[list[TokenId], Field(max_length=MAX_LOGPROB_IDS)]
Logprobs = Annotated[int, Field(ge=-1, lt=2**31, description="-1: the whole vocabulary, where the server allows it")]
BadWord = Annotated[str, StringConstraints(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[list[BadWord], Field(max_length=MAX_BAD_WORDS)]
LengthPenalty = Annotated[float, Field(ge=-100, le=100, description="of beam search")]
EarlyStopping = Annotated[bool | Literal["never"], Field(description="of beam search")]
ThinkingBudget = Annotated[int, Field(ge=-1, lt=2**32, description="-1: no bound")]
StreamInterval = Annotated[int, Field(ge=1, le=2**20, description="tokens of one streamed chunk")]
Priority = Annotated[int, Field(ge=-2**63, lt=2**63)]
CacheSalt = Annotated[str, StringConstraints(min_length=1, max_length=128)]
RequestId = Annotated[str, StringConstraints(pattern=REQUEST_ID)]


class Repetition(Body):
    """When a choice counts as repeating itself, and ends."""

    max_pattern_size: Annotated[int, Field(ge=0, le=MAX_PATTERN, description="0: off")]
    min_pattern_size: Annotated[int, Field(ge=0, le=MAX_PATTERN, description="0: 1")] = 0
    min_count: Annotated[int, Field(ge=2, le=2**20)]
