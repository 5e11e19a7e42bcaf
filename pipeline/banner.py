"""The lines that the terminal shows once the server is ready: model, memory, limits, authentication, URLs.

Made by the launcher from the configuration and an engine's facts. Never holds a secret.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline import __version__
from pipeline.config import POOLING_TASKS, ModelConfig, ServerConfig
from pipeline.listen import Listeners


def facts_of(data: bytes) -> dict[str, Any]:
    """An engine's facts from its beacon; {} where there are none."""
    try:
        facts = json.loads(data) if data else {}
    except ValueError:
        facts = {}
    return facts if isinstance(facts, dict) else {}


def lines(config: ServerConfig, listeners: Listeners, facts: Mapping[int, dict[str, Any]], seconds: float) -> list[str]:
    """The banner; `facts` of each engine by its number, `seconds` since the start."""
    engines = config.engines()
    shown = []
    for number, model in enumerate(config.models):
        shown += _model(model, facts.get(engines.index(number), {}), len(config.models) > 1)
    if len(config.models) > 1:
        shown.insert(0, f"quartet {__version__} serves {len(config.models)} models")
    else:
        shown[0] = f"quartet {__version__} serves " + shown[0]
    keyed = bool(config.http.api_keys or config.http.api_key_file)
    shown.append("  API key required" if keyed else "  no API key: whoever reaches this address may use the server")
    if not listeners.loopback:
        shown.append(f"  listening on {listeners.host}")
        if not keyed:
            shown.append(f"WARNING: the server listens on {listeners.host} WITHOUT an API key: everybody who can reach "
                         "this machine can use it (set QUARTET_API_KEY or --api-key-file).")
    if listeners.uds is None:
        docs = f", documentation {listeners.url}/docs" if config.http.enable_docs else ""
        shown.append(f"  OpenAI base URL {listeners.url}/v1{docs}")
    shown.append(f"Ready in {seconds:.1f} s on {listeners.url}")
    return shown


def _model(model: ModelConfig, facts: Mapping[str, Any], many: bool) -> list[str]:
    """The lines about one model."""
    about = [str(facts[key]) for key in ("architecture", "dtype", "device", "backend") if facts.get(key)]
    task = [model.task] if many or model.task != "generate" else []
    copies = [f"{model.replicas} engines"] if model.replicas > 1 else []
    words = ", ".join([*task, *about, *copies])
    title = ("  " if many else "") + model.names[0] + (f" ({words})" if words else "")
    if many and not facts:
        return [title + ": given up"]
    length = facts.get("max_model_len", model.max_model_len)
    if model.task in POOLING_TASKS:
        size = facts.get("dimension") or facts.get("num_labels")
        what = "dimensions" if facts.get("dimension") else "class" if size == 1 else "classes"
        line = f"  context {length} tokens" + (f", {size} {what}" if isinstance(size, int) and size else "")
    else:
        line = f"  context {length} tokens"
        blocks, size = facts.get("kv_blocks"), facts.get("block_size", model.engine.block_size)
        if isinstance(blocks, int) and isinstance(size, int):
            tokens = blocks * size
            line += f", KV cache {tokens} tokens ({tokens / max(1, model.max_model_len):.1f} requests of full length)"
        line += f", up to {model.engine.max_num_seqs} requests in a step"
    return [title, "  " + line if many else line]
