"""The truth about whether a request would be answered now. Run by the frontend; reads beacons only.

/live: this process turns. /ready and /health: 200 once every stage and every model can answer; from then on 503 only
when no model can, or when the server drains. A stage counts while its beacon is fresh and its loop turns.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

from frontend.stages import Stages
from pipeline.config import ServerConfig


class Health:
    """Readiness of the whole server as this frontend sees it."""

    def __init__(self, config: ServerConfig, stages: Stages, draining: Callable[[], bool]) -> None:
        self._config, self._stages, self._draining = config, stages, draining
        self._was_ready = False

    def ready(self) -> tuple[bool, dict[str, Any]]:
        """Whether to send traffic here, and who is missing."""
        missing = self._stages.missing()
        models = {m.names[0]: self._stages.can_answer(i) for i, m in enumerate(self._config.models)}
        self._was_ready = self._was_ready or (not missing and all(models.values()))
        ok = self._was_ready and any(models.values()) and not self._draining()
        status = "draining" if self._draining() else "ok" if ok else "unavailable" if self._was_ready else "starting"
        return ok, {"status": status, "missing": missing, "models": models}
