"""--enable-log-requests and --enable-log-outputs: what users ask and get, in the frontends' logs, cut to --max-log-len.

Off by default: these lines hold what people wrote. Keys are in no line. Run by the frontend.
"""
from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from frontend.collector import Update
from frontend.params import Ask
from frontend.request import Prompt
from frontend.sse import Events
from frontend.wire import dump
from pipeline.config import AccessLogConfig
from pipeline.messages import unpack_ids

MAX_PROMPTS = 16                 # of one request that are shown
log = logging.getLogger("frontend.requests")


class RequestLog:
    """Writes the lines of one server's rules."""

    def __init__(self, config: AccessLogConfig) -> None:
        self._config = config

    def received(self, request_id: str, ask: Ask) -> None:
        """A request was accepted."""
        if self._config.requests:
            spec = ask.spec
            log.info("request %s", request_id, extra={"fields": {
                "request_id": request_id, "model": ask.model, "n": spec.n, "stream": spec.stream,
                "prompts": [self._prompt(prompt) for prompt in spec.prompts[:MAX_PROMPTS]], "params": _params(spec.sampling)}})

    def answered(self, request_id: str, body: dict[str, Any]) -> None:
        """A plain answer is complete."""
        if self._config.outputs:
            self.write(request_id, dump(body["choices"]).decode("utf-8", "replace"))

    def streamed(self, request_id: str, events: Events[Update]) -> Events[Update]:
        """`events`, whose texts are written when their stream is complete."""
        return Overheard(self, request_id, events, self._config.max_len) if self._config.outputs else events

    def write(self, request_id: str, text: str) -> None:
        """An answer's text, as far as it may be shown."""
        log.info("answer %s", request_id, extra={"fields": {
            "request_id": request_id, "answer": text[:self._config.max_len]}})

    def _prompt(self, prompt: Prompt) -> str | list[int]:
        limit = self._config.max_len
        if prompt.text is not None:
            return prompt.text[:limit]
        if prompt.chat is not None:
            return prompt.chat.messages_json.decode("utf-8", "replace")[:limit]
        return list(unpack_ids(prompt.ids[:4 * limit]))


class Overheard:
    """Events whose texts are kept, up to a limit per choice."""

    def __init__(self, written: RequestLog, request_id: str, events: Events[Update], limit: int) -> None:
        self._log, self._request_id, self._events, self._limit = written, request_id, events, limit
        self._texts: dict[int, str] = {}

    def events(self, updates: Sequence[Update]) -> bytes:
        for update in updates:
            known = self._texts.get(update.index, "")
            self._texts[update.index] = known + update.text[:max(0, self._limit - len(known))]
        return self._events.events(updates)

    def end(self) -> bytes:
        texts = [self._texts[index] for index in sorted(self._texts)]
        self._log.write(self._request_id, dump(texts).decode("utf-8", "replace"))
        return self._events.end()


def _params(sampling: Any) -> dict[str, Any]:
    """The fields of the sampling parameters that differ from their defaults, without those that are ids in bytes."""
    return {f.name: value for f in dataclasses.fields(sampling)
            if isinstance(value := getattr(sampling, f.name), (int, float, str)) and value != f.default}
