"""Routes that say something about the server: models, version, health, metrics, the API's own description.

None of them waits for another process. Run by the frontend.
"""
from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sanic.response import HTTPResponse

from frontend.call import Call
from frontend.docs import POLICY, page
from frontend.health import Health
from frontend.ingress import Ingress, json_response
from frontend.metrics import OPEN_REQUESTS
from frontend.openapi import document
from frontend.params import find_model
from frontend.wire import dump
from pipeline import __version__
from pipeline.config import ModelConfig, ServerConfig
from pipeline.errors import QuartetError, StartError
from pipeline.messages import Kind
from pipeline.metrics import exposition
from pipeline.tokenizer_files import describe

if TYPE_CHECKING:
    from frontend.server import Frontend


class Info:
    """Everything that is answered from what this process knows."""

    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend
        self._health = Health(frontend.config, frontend.stages, lambda: frontend.table.draining)

    def register(self, ingress: Ingress) -> None:
        ingress.get("/v1/models", self.models)
        ingress.get("/v1/models/<name:path>", self.model)
        ingress.get("/version", self.version)
        ingress.get("/load", self.load)
        if self._frontend.config.http.tokenizer_info:
            ingress.get("/tokenizer_info", self.tokenizer_info)
        ingress.get("/live", self.live, open=True, quiet=True)
        ingress.get("/ready", self.ready, open=True, quiet=True)
        ingress.get("/health", self.ready, open=True, quiet=True)
        ingress.get_or_post("/ping", self.ready, open=True)
        ingress.get("/metrics", self.metrics, open=not self._frontend.config.http.metrics_need_key, quiet=True)

    async def models(self, call: Call) -> HTTPResponse:
        entries = [self._entry(name, model) for model in self._frontend.config.models for name in model.names]
        return json_response({"object": "list", "data": entries})

    async def model(self, call: Call, name: str) -> HTTPResponse:
        if not name:                                         # /v1/models/
            return await self.models(call)
        for model in self._frontend.config.models:
            if name in model.names:
                return json_response(self._entry(name, model))
        raise QuartetError("model_not_found", f"The model '{name[:100]}' does not exist.", "model")

    def _entry(self, name: str, model: ModelConfig) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self._frontend.created, "owned_by": "quartet",
                "root": model.names[0], "parent": None, "max_model_len": model.max_model_len,
                "context_length": model.max_model_len, "task": model.task}

    async def version(self, call: Call) -> HTTPResponse:
        return json_response({"version": __version__})

    async def load(self, call: Call) -> HTTPResponse:
        """Requests in flight: our own exactly, those of other frontends as their last metrics told."""
        own = (Kind.FRONTEND, self._frontend.index)
        others = (sample.value for key, families in self._frontend.snapshots().items() if key != own
                  for family in families if family.name == OPEN_REQUESTS for sample in family.samples)
        return json_response({"server_load": len(self._frontend.table) + int(sum(others))})

    async def tokenizer_info(self, call: Call) -> HTTPResponse:
        """The tokenizer's configuration as the model's directory has it, and the template that chats are rendered with."""
        model = self._frontend.config.models[find_model(self._frontend.config, call.http.args.get("model"))]
        try:
            found = await asyncio.get_running_loop().run_in_executor(None, describe, model.tokenizer or model.path)
        except StartError:
            raise QuartetError("internal_error", "The tokenizer's files cannot be read.") from None
        if model.chat_template is not None:
            found["chat_template"] = model.chat_template
        return json_response(found)

    async def live(self, call: Call) -> HTTPResponse:
        return json_response({"status": "ok"})

    async def ready(self, call: Call) -> HTTPResponse:
        ok, body = self._health.ready()
        response = json_response(body, 200 if ok else 503)
        if not ok:
            response.headers["Retry-After"] = "1"
        return response

    async def metrics(self, call: Call) -> HTTPResponse:
        text = exposition(self._frontend.snapshots().values())
        return HTTPResponse(text, content_type="text/plain; version=0.0.4; charset=utf-8")


def register_document(ingress: Ingress, config: ServerConfig) -> None:
    """GET /openapi.json and /docs, made when they are asked for first."""
    made: dict[str, bytes] = {}

    async def openapi(call: Call) -> HTTPResponse:
        if "json" not in made:
            made["json"] = dump(document(config))
        return HTTPResponse(made["json"], content_type="application/json")

    async def docs(call: Call) -> HTTPResponse:
        if "html" not in made:
            made["html"] = page(document(config))
        return HTTPResponse(made["html"], content_type="text/html; charset=utf-8", headers={
            "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})

    ingress.get("/openapi.json", openapi)
    ingress.get("/docs", docs)
