"""POST /tokenize and /detokenize: questions that a tokenizer answers. Run by the frontend."""
from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend.bodies import parse_object, validate
from frontend.call import Call
from frontend.ingress import Ingress, json_response
from frontend.params import find_model, template_input
from frontend.queries import QueryMessage
from frontend.schema import DetokenizeBody, TokenizeBody, TokenizeChatBody
from pipeline.errors import invalid
from pipeline.messages import DetokenizeAnswer, DetokenizeQuery, TokenizeAnswer, TokenizeQuery, pack_ids, unpack_ids

if TYPE_CHECKING:
    from frontend.server import Frontend

TIMEOUT_S = 60.0
MAX_CONTEXTS = 16                # ids that /detokenize takes, in context lengths of the model


class Tokens:
    """The routes about token ids."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    def register(self, ingress: Ingress) -> None:
        ingress.post("/tokenize", self.tokenize)
        ingress.post("/detokenize", self.detokenize)

    async def tokenize(self, call: Call) -> HTTPResponse:
        return json_response(await tokenize(self._frontend, call.body))

    async def detokenize(self, call: Call) -> HTTPResponse:
        return json_response(await detokenize(self._frontend, call.body))


async def tokenize(frontend: Frontend, content: bytes) -> dict[str, Any]:
    """The answer to a body of /tokenize: text or chat to ids."""
    raw, config = parse_object(content), frontend.config
    if "messages" in raw:
        chat_body = validate(TokenizeChatBody, raw)
        number = find_model(config, chat_body.model)
        chat, text, special = template_input(chat_body, raw, config), None, bool(chat_body.add_special_tokens)
        strings = bool(chat_body.return_token_strs)
    else:
        body = validate(TokenizeBody, raw)
        number = find_model(config, body.model)
        chat, text, special = None, body.prompt, body.add_special_tokens is not False
        strings = bool(body.return_token_strs)
    answer = await _ask(frontend, len(content), lambda rid, epoch: TokenizeQuery(
        rid, epoch, number, text, chat, special, strings))
    assert isinstance(answer, TokenizeAnswer)
    ids = list(unpack_ids(answer.ids))
    return {"count": len(ids), "max_model_len": config.models[number].max_model_len, "tokens": ids,
            "token_strs": answer.strings}


async def detokenize(frontend: Frontend, content: bytes) -> dict[str, Any]:
    """The answer to a body of /detokenize: ids to text."""
    body = validate(DetokenizeBody, parse_object(content))
    number = find_model(frontend.config, body.model)
    model = frontend.config.models[number]
    limit = MAX_CONTEXTS * model.max_model_len
    if len(body.tokens) > limit:
        raise invalid(f"'tokens' may hold at most {limit} ids.", "tokens")
    if body.tokens and max(body.tokens) >= (model.vocab_size or 2**32):
        raise invalid("'tokens' holds a token id that the model does not have.", "tokens")
    ids = pack_ids(body.tokens)
    answer = await _ask(frontend, len(content), lambda rid, epoch: DetokenizeQuery(rid, epoch, number, ids))
    assert isinstance(answer, DetokenizeAnswer)
    return {"prompt": answer.text}


async def _ask(frontend: Frontend, num_bytes: int, make: QueryMessage) -> Any:
    with frontend.admission.acquire(num_bytes, 0):
        news = asyncio.Event()
        query = frontend.table.query(make, news.set, time.monotonic_ns() + int(TIMEOUT_S * 1e9))
        try:
            await news.wait()
            if query.error is not None:
                raise query.error
            return query.answer
        finally:
            frontend.table.queries.close(query)
