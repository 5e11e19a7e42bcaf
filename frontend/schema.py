"""The bodies of POST /v1/completions, /v1/chat/completions, /tokenize and /detokenize.

These models validate what arrives and make /openapi.json. What a field means is decided in frontend.params; what is
known and not supported is listed in frontend.fields. Run by the frontend; holds no state.
"""
from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from frontend.constraints import Constrained
from frontend.embeds import Embeds
from frontend.fields import (
    MAX_PROMPTS,
    AllowedIds,
    BadWords,
    Bias,
    Body,
    CacheSalt,
    EarlyStopping,
    LengthPenalty,
    LogprobIds,
    Logprobs,
    MinP,
    N,
    NumTokens,
    Penalty,
    Priority,
    Repetition,
    RepetitionPenalty,
    RequestId,
    Seed,
    StopIds,
    Stops,
    StreamInterval,
    Temperature,
    ThinkingBudget,
    TokenId,
    TopK,
    TopP,
    Truncate,
)
from frontend.tools import ToolChoice, Tools

TEXT_PARTS = ("text", "input_text", "output_text", "refusal", "thinking")


def _prompts(value: Any) -> Any:
    """Any of the four prompt forms as a list of strings or a list of id lists."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("prompt", "a string, a list of strings, a list of token ids or a list of such "
                                            "lists is expected, and it must not be empty")
    prompts = [value] if type(value[0]) is int else value
    if len(prompts) > MAX_PROMPTS:
        raise PydanticCustomError("prompt", "at most {limit} prompts are taken in one request", {"limit": MAX_PROMPTS})
    if all(isinstance(p, str) for p in prompts):
        return prompts
    for ids in prompts:
        if not isinstance(ids, list) or not ids or any(type(i) is not int or not 0 <= i < 2**32 for i in ids):
            raise PydanticCustomError("prompt", "every prompt must be a string, or every prompt a list of token ids "
                                                "that is not empty")
    return prompts


_PROMPT_SCHEMA = {"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_PROMPTS},
    {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
    {"type": "array", "items": {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1},
     "minItems": 1, "maxItems": MAX_PROMPTS}]}
Prompts = Annotated[Any, BeforeValidator(_prompts), WithJsonSchema(_PROMPT_SCHEMA)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, dict) else value


class StreamOptions(Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Sampling(Constrained):
    """What completions and chat have in common."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: N | None = None
    best_of: N | None = Field(None, description="choices that are computed; the n best of them are the answer")
    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stops | None = None
    stop_token_ids: StopIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    max_tokens: NumTokens | None = None
    min_tokens: NumTokens | None = None
    logit_bias: Bias | None = None
    allowed_token_ids: AllowedIds | None = None
    bad_words: BadWords | None = None
    logprob_token_ids: LogprobIds | None = None
    prompt_logprobs: Logprobs | None = None
    repetition_detection: Repetition | None = None
    thinking_token_budget: ThinkingBudget | None = None
    use_beam_search: bool | None = None
    length_penalty: LengthPenalty | None = None
    early_stopping: EarlyStopping | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Truncate | None = None
    truncation_side: Literal["left", "right"] | None = None
    echo: bool | None = None
    priority: Priority | None = None
    cache_salt: CacheSalt | None = None
    request_id: RequestId | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream_interval: StreamInterval | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    HONOURS: ClassVar[frozenset[str]] = frozenset({"prompt_embeds", "suffix"})

    prompt: Prompts | None = None
    prompt_embeds: Annotated[list[Embeds], BeforeValidator(_as_list), Field(max_length=MAX_PROMPTS)] | None = Field(
        None, description="prompts as embeddings, where the server was started with --enable-prompt-embeds")
    suffix: str | None = Field(None, description="only where the model fills in the middle")
    logprobs: Logprobs | None = None


class Part(Body):
    """One part of a message's content; this server takes text."""

    model_config = ConfigDict(extra="allow")

    type: str = "text"


class Message(Body):
    """One message of a chat; further keys are for the template."""

    model_config = ConfigDict(extra="allow")

    role: Annotated[str, Field(min_length=1, max_length=64)]
    content: str | list[str | Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None


class Templated(Body):
    """What goes into a chat template."""

    HONOURS: ClassVar[frozenset[str]] = frozenset({"tools"})

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Tools | None = None
    documents: list[dict[str, str]] | None = None
    chat_template: str | None = Field(None, description="only where the server trusts it")
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None


class ChatBody(Templated, Sampling):
    """POST /v1/chat/completions."""

    HONOURS: ClassVar[frozenset[str]] = frozenset({"tools", "tool_choice", "parallel_tool_calls", "include_reasoning",
                                                  "return_prompt_text"})

    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    return_prompt_text: bool | None = None
    max_completion_tokens: NumTokens | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = Field(None, description="false: reasoning is left out of the answer")
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class TokenizeBody(Body):
    """POST /tokenize with a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatBody(Templated):
    """POST /tokenize with a chat."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
