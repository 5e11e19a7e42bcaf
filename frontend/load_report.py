"""The answer header `endpoint-load-metrics`, for callers that balance load by it. Run by the frontend.

A caller asks by `endpoint-load-metrics-format: text` or `json`; the report is about all engines of the request's model,
as their beacons told last.
"""
from __future__ import annotations

import json

from frontend.stages import Stages

LOAD_ASKED, LOAD_GIVEN = "endpoint-load-metrics-format", "endpoint-load-metrics"


def load_report(stages: Stages, model: int, form: str) -> str | None:
    """The header's value; None where no format is asked for that is known."""
    if form.lower() not in ("json", "text"):
        return None
    loads = stages.loads_of(model)
    used, total = sum(load.kv_used for load in loads), sum(load.kv_total for load in loads)
    metrics = {"kv_cache_usage_perc": round(used / total, 4) if total else 0.0,
               "num_requests_waiting": sum(load.waiting for load in loads)}
    if form.lower() == "json":
        return "JSON " + json.dumps({"named_metrics": metrics})
    return "TEXT " + ", ".join(f"named_metrics.{name}={value}" for name, value in metrics.items())
