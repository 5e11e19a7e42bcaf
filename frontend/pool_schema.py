"""The bodies of POST /v1/embeddings, /pooling, /classify, /score and /rerank.

These models validate what arrives and make /openapi.json; what a field means is decided in frontend.pool_params and
frontend.scoring. Run by the frontend; holds no state.
"""
from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, StringConstraints, WithJsonSchema
from pydantic_core import PydanticCustomError

from frontend.fields import Body, CacheSalt, Priority, RequestId, Truncate
from pipeline.messages import pack_ids

MAX_INPUTS = 2048
MAX_CONTENT_PARTS = 64


def _inputs(value: Any) -> Any:
    """Any of the four forms of `input` as a list of strings, or of packed token ids."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError("input", "a string, a list of strings, a list of token ids or a list of such lists is "
                                           "expected, and it must not be empty")
    inputs = [value] if type(value[0]) is int else value
    if len(inputs) > MAX_INPUTS:
        raise PydanticCustomError("input", "at most {limit} inputs are taken in one request", {"limit": MAX_INPUTS})
    if all(type(text) is str for text in inputs):
        return inputs
    packed = []
    for ids in inputs:
        if type(ids) is not list or not ids or set(map(type, ids)) != {int} or min(ids) < 0 or max(ids) >= 2**32:
            raise PydanticCustomError("input", "every input must be a string, or every input a list of token ids that is "
                                               "not empty")
        packed.append(pack_ids(ids))
    return packed


def _text(value: Any) -> str:
    """A text, given as a string, as {"text": ...} or as {"content": [{"type": "text", "text": ...}]}."""
    if isinstance(value, dict):
        content = value.get("content", value.get("text"))
        if isinstance(content, list) and 0 < len(content) <= MAX_CONTENT_PARTS and all(
                isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
                for part in content):
            return "\n".join(part["text"] for part in content)
        value = content
    if not isinstance(value, str):
        raise PydanticCustomError("text", "a string, or an object with a text, is expected")
    return value


def _texts(value: Any) -> Any:
    """One text or a list of texts. A list is told from a single text by its caller: see `Texts`."""
    if not isinstance(value, list):
        return _text(value)
    if not value or len(value) > MAX_INPUTS:
        raise PydanticCustomError("texts", "a list of 1 to {limit} texts is expected", {"limit": MAX_INPUTS})
    return [_text(text) for text in value]


_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT_SCHEMA = {"anyOf": [
    {"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": MAX_INPUTS}, _IDS,
    {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_INPUTS}]}
_TEXT_SCHEMA = {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"text": {"type": "string"}}}]}
_TEXTS_SCHEMA = {"anyOf": [_TEXT_SCHEMA, {"type": "array", "items": _TEXT_SCHEMA, "minItems": 1, "maxItems": MAX_INPUTS}]}
Inputs = Annotated[Any, BeforeValidator(_inputs), WithJsonSchema(_INPUT_SCHEMA)]
Text = Annotated[Any, BeforeValidator(_text), WithJsonSchema(_TEXT_SCHEMA)]
Texts = Annotated[Any, BeforeValidator(_texts), WithJsonSchema(_TEXTS_SCHEMA)]
Limit = Annotated[int, Field(ge=0, lt=2**31, description="0: no limit")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=128)]


class Pooled(Body):
    """What every body of a pooling model has in common."""

    HONOURS: ClassVar[frozenset[str]] = frozenset({"truncation_side"})

    model: str | None = None
    truncate_prompt_tokens: Truncate | None = Field(None, description="keep N tokens; -1: what the model takes")
    truncation_side: Literal["left", "right"] | None = Field(None, description="which end is cut (default: right)")
    use_activation: bool | None = Field(None, description="normalise embeddings, squash scores (default: as the model does)")
    padding: Literal["do_not_pad"] | None = None
    priority: Priority | None = None
    request_id: RequestId | None = None
    cache_salt: CacheSalt | None = Field(None, description="pooling models keep no cache, so that nothing is shared")


class FromInput(Body):
    """Texts or token ids."""

    input: Inputs
    add_special_tokens: bool | None = None


class FromMessages(Body):
    """One chat, or a list of chats, through the chat template."""

    messages: Annotated[list[Any], Field(min_length=1, max_length=MAX_INPUTS)]
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = Field(None, description="only where the server trusts it")
    chat_template_kwargs: dict[str, Any] | None = None


class Encoded(Pooled):
    """How vectors are written."""

    encoding_format: Literal["float", "base64", "bytes", "bytes_only"] | None = None
    embed_dtype: Literal["float32", "float16", "bfloat16", "fp8_e4m3", "fp8_e5m2"] | None = None
    endianness: Literal["native", "little", "big"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    normalize: bool | None = Field(None, description="as use_activation")
    prompt_name: Name | None = Field(None, description="which of the model's prompts goes ahead of each text")


class EmbeddingBody(Encoded, FromInput):
    """POST /v1/embeddings with texts or token ids."""


class EmbeddingChatBody(Encoded, FromMessages):
    """POST /v1/embeddings with chats."""


class Tasked(Encoded):
    """What /pooling may ask besides."""

    task: Literal["embed", "classify", "score", "token_embed", "token_classify"] | None = Field(
        None, description="default: what the model is for")
    softmax: bool | None = Field(None, description="as use_activation")
    activation: bool | None = Field(None, description="as use_activation")


class PoolingBody(Tasked, FromInput):
    """POST /pooling with texts or token ids."""


class PoolingChatBody(Tasked, FromMessages):
    """POST /pooling with chats."""


class Classified(Pooled):
    softmax: bool | None = Field(None, description="as use_activation")
    activation: bool | None = Field(None, description="as use_activation")


class ClassifyBody(Classified, FromInput):
    """POST /classify with texts or token ids."""


class ClassifyChatBody(Classified, FromMessages):
    """POST /classify with chats."""


class Scored(Classified):
    """What /score and /rerank have in common."""

    max_tokens_per_query: Limit | None = None
    max_tokens_per_doc: Limit | None = None
    instruction: str | None = Field(None, description="what the texts are compared for; only for models that take one")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="variables of the template that joins two texts")


class ScoreBody(Scored):
    """POST /score. The texts may also be called queries and documents (or items), or data_1 and data_2."""

    text_1: Texts
    text_2: Texts


class RerankBody(Scored):
    """POST /rerank."""

    query: Text
    documents: Texts
    top_n: Limit | None = Field(None, description="0: all")
    return_documents: bool | None = Field(None, description="show the documents in the results (default: yes)")
    rank_fields: list[str] | None = Field(None, description="only [\"text\"]")
    max_chunks_per_doc: Literal[1] | None = Field(None, description="a document is never split")
