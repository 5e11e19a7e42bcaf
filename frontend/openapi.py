"""/openapi.json, made from the schemas that validate. Run by the frontend, once."""
from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from frontend.fields import Body
from frontend.pool_schema import (
    ClassifyBody,
    ClassifyChatBody,
    EmbeddingBody,
    EmbeddingChatBody,
    PoolingBody,
    PoolingChatBody,
    RerankBody,
    ScoreBody,
)
from frontend.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, TokenizeChatBody
from frontend.speech_schema import TranscriptionBody, TranslationBody
from pipeline import __version__
from pipeline.config import ServerConfig

POSTS: dict[str, tuple[str, tuple[type[Body], ...]]] = {
    "/v1/completions": ("Continue a prompt.", (CompletionBody,)),
    "/v1/chat/completions": ("Answer a chat.", (ChatBody,)),
    "/v1/embeddings": ("Texts, token ids or chats to vectors.", (EmbeddingBody, EmbeddingChatBody)),
    "/pooling": ("The same for any pooling model: vectors, vectors per token, class scores.",
                 (PoolingBody, PoolingChatBody)),
    "/classify": ("Probabilities of classes.", (ClassifyBody, ClassifyChatBody)),
    **dict.fromkeys(("/score", "/v1/score"), ("Scores of pairs of texts.", (ScoreBody,))),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), ("Documents by relevance to a query.", (RerankBody,))),
    "/tokenize": ("Text or chat to token ids.", (TokenizeBody, TokenizeChatBody)),
    "/detokenize": ("Token ids to text.", (DetokenizeBody,)),
}
FORMS: dict[str, tuple[str, type[BaseModel]]] = {
    "/v1/audio/transcriptions": ("A recording to text.", TranscriptionBody),
    "/v1/audio/translations": ("A recording to English text.", TranslationBody),
}
_GETS = {
    "/v1/models": "The models of this server.", "/v1/models/{id}": "One model.", "/version": "The server's version.",
    "/live": "Whether the frontend turns.", "/ready": "Whether requests would be answered.",
    "/health": "As /ready.", "/ping": "As /ready.", "/metrics": "Metrics of all processes, Prometheus text.",
    "/load": "Requests in flight.",
}
_ERROR = {"type": "object", "required": ["error"], "properties": {"error": {
    "type": "object", "required": ["message", "type", "param", "code"], "properties": {
        "message": {"type": "string"}, "type": {"type": "string"}, "param": {"type": ["string", "null"]},
        "code": {"type": ["string", "null"]}}}}}


def document(config: ServerConfig) -> dict[str, Any]:
    """The OpenAPI description of every route."""
    bodies: list[tuple[type[BaseModel], Literal["validation"]]] = [
        (body, "validation") for body in (*(b for _, found in POSTS.values() for b in found),
                                          *(b for _, b in FORMS.values()))]
    _, schemas = models_json_schema(bodies, ref_template="#/components/schemas/{model}")
    failure = {"description": "An error.", "content": {"application/json": {
        "schema": {"$ref": "#/components/schemas/Error"}}}}
    paths: dict[str, Any] = {}
    for path, (summary, found) in POSTS.items():
        refs = [{"$ref": f"#/components/schemas/{b.__name__}"} for b in found]
        paths[path] = {"post": {
            "summary": summary, "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": {"application/json": {
                "schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}}},
            "responses": {"200": {"description": "The answer."}, "default": failure}}}
    for path, (summary, form) in FORMS.items():
        file = {"type": "object", "required": ["file"], "properties": {"file": {"type": "string", "format": "binary"}}}
        paths[path] = {"post": {
            "summary": summary, "operationId": path.strip("/").replace("/", "_"),
            "requestBody": {"required": True, "content": {"multipart/form-data": {
                "schema": {"allOf": [file, {"$ref": f"#/components/schemas/{form.__name__}"}]}}}},
            "responses": {"200": {"description": "The answer."}, "default": failure}}}
    for path, summary in _GETS.items():
        operation: dict[str, Any] = {"summary": summary, "operationId": path.strip("/").replace("/", "_"),
                                     "responses": {"200": {"description": "The answer."}, "default": failure}}
        if "{id}" in path:
            operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0", "info": {"title": "Quartet", "version": __version__},
        **({"servers": [{"url": config.http.root_path}]} if config.http.root_path else {}),
        "paths": paths, "security": [{"key": []}],
        "components": {"schemas": {**schemas.get("$defs", {}), "Error": _ERROR},
                       "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}}}
