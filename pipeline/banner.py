"""The lines that the terminal shows once the server is ready: model, memory, limits, authentication, URLs.

Made by the launcher from the configuration and an engine's facts. Never holds a secret.
"""
from __future__ import annotations

import json
from typing import Any

from pipeline import __version__
from pipeline.config import ServerConfig
from pipeline.listen import Listeners


def facts_of(data: bytes) -> dict[str, Any]:
    """An engine's facts from its beacon; {} where there are none."""
    try:
        facts = json.loads(data) if data else {}
    except ValueError:
        facts = {}
    return facts if isinstance(facts, dict) else {}


def lines(config: ServerConfig, listeners: Listeners, facts: dict[str, Any], seconds: float) -> list[str]:
    """The banner; `facts` are those of the first engine, `seconds` the time since the start."""
    model = config.models[0]
    about = [str(facts[key]) for key in ("architecture", "dtype", "device", "backend") if facts.get(key)]
    context = f"  context {facts.get('max_model_len', model.max_model_len)} tokens"
    blocks, size = facts.get("kv_blocks"), facts.get("block_size", model.engine.block_size)
    if isinstance(blocks, int) and isinstance(size, int):
        tokens = blocks * size
        context += (f", KV cache {tokens} tokens ({tokens / max(1, model.max_model_len):.1f} requests of full length)")
    context += f", up to {model.engine.max_num_seqs} requests in a step"
    keyed = bool(config.http.api_keys or config.http.api_key_file)
    shown = [f"quartet {__version__} serves {model.names[0]}" + (f" ({', '.join(about)})" if about else ""), context,
             "  API key required" if keyed else "  no API key: whoever reaches this address may use the server"]
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
