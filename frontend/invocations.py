"""POST /invocations, the one route of SageMaker: the body says which endpoint is meant. Run by the frontend.

Nothing is decided here but the route; the handler of that route checks the body as if it had come directly.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend.bodies import parse_object
from frontend.call import Call
from frontend.choose import named
from frontend.ingress import Ingress
from pipeline.errors import QuartetError

if TYPE_CHECKING:
    from frontend.server import Frontend

# Fields that tell an endpoint by themselves, first match wins; then by what the model does, or any model could do.
BY_FIELDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("query", "documents"), "/rerank"), (("text_1", "text_2"), "/score"), (("queries", "documents"), "/score"),
    (("data_1", "data_2"), "/score"), (("prompt",), "/v1/completions"))
BY_TASK = {"generate": "/v1/chat/completions", "embed": "/v1/embeddings", "classify": "/classify", "score": "/score"}


class Invocations:
    """Dispatches by body."""

    def __init__(self, frontend: Frontend, ingress: Ingress) -> None:
        self._frontend, self._ingress = frontend, ingress

    def register(self) -> None:
        self._ingress.post("/invocations", self.invoke)

    async def invoke(self, call: Call) -> HTTPResponse | None:
        path = self._route(parse_object(call.body))
        handler = self._ingress.handlers.get(path or "")
        if handler is None:
            raise QuartetError("invalid_request", "The body fits none of this server's endpoints: it needs 'messages', "
                                                  "'prompt', 'input', 'text_1' and 'text_2', or 'query' and 'documents'.")
        call.fields["invoked"] = path
        return await handler(call)

    def _route(self, body: Mapping[str, Any]) -> str | None:
        for names, path in BY_FIELDS:
            if all(name in body for name in names):
                return path
        if "messages" not in body and "input" not in body:
            return None
        config, name = self._frontend.config, body.get("model")
        asked = [config.models[named(config, name)]] if isinstance(name, str) and name else config.models
        tasks = {model.task for model in asked} - ({"generate"} if "messages" not in body else set())
        return next((path for task, path in BY_TASK.items() if task in tasks), None)
