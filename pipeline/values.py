"""How the text of an option becomes a value: numbers with units, switches, names, JSON.

Run by the command line only. Each function raises ValueError with the rest of the sentence "... must be ...".
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

_POWERS = {"": 1, "k": 1000, "K": 2**10, "m": 1000**2, "M": 2**20, "g": 1000**3, "G": 2**30, "t": 1000**4, "T": 2**40}
TEMPLATE_NAMES = ("chatml", "llama2", "alpaca", "vicuna", "zephyr", "plain", "qwen3-reranker")  # pipeline/templates/
HIDDEN = "<hidden>"              # what --print-config shows in place of a secret
_COUNT = re.compile(r"(\d+(?:\.\d+)?)([kKmMgGtT]?)((?:i?B)?)")


def switch(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError("true or false")


def count(text: str) -> int:
    """'4096', '32k' (thousands), '32K' (1024s), '2G', '1.5GiB' as an integer."""
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise ValueError("a number such as 4096, 32k or 2G")
    number, unit, suffix = match.groups()
    scale = _POWERS[unit.lower()] if suffix == "B" else _POWERS[unit.upper() if suffix == "iB" else unit]
    value = float(number) * scale
    if value != int(value):
        raise ValueError("a whole number")
    return int(value)


def integer(low: int, high: int, parse: Callable[[str], int] = int) -> Callable[[str], int]:
    def convert(text: str) -> int:
        try:
            value = parse(text)
        except ValueError:
            value = low - 1
        if not low <= value <= high:
            raise ValueError(f"a whole number from {low} to {high}")
        return value
    return convert


def seconds(low: float, high: float = 30 * 86400.0) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not low <= value <= high:
            raise ValueError(f"a number of seconds from {low:g} to {high:g}")
        return value
    return convert


def interval(text: str) -> float:
    """Seconds between two events; 0 is never."""
    if text.strip() in ("0", "0.0"):
        return 0.0
    return seconds(0.1, 3600)(text)


def root_path(text: str) -> str:
    """A prefix without a slash at its end; "" for none."""
    path = text.rstrip("/")
    if path and re.fullmatch(r"(/[A-Za-z0-9._~-]+)+", path) is None:
        raise ValueError("a path such as /llm")
    return path


def origin(text: str) -> str:
    """An origin as browsers send it, or * for all."""
    if text != "*" and re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/,?#]+", text) is None:
        raise ValueError("an origin such as https://example.org, or *")
    return text


def header_word(text: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", text) is None:
        raise ValueError("a name as HTTP knows it, or *")
    return text


def url_path(text: str) -> str:
    if not text.startswith("/"):
        raise ValueError("a path that begins with /")
    return text


def max_model_len(text: str) -> int | None:
    """None stands for 'auto': what the model has."""
    if text in ("auto", "-1"):
        return None
    try:
        value = count(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 2**31:
        raise ValueError("a number of tokens such as 4096 or 32k, or auto")
    return value


def dtype(text: str) -> str:
    name = {"half": "float16", "float": "float32"}.get(text, text)
    if name not in ("auto", "bfloat16", "float16", "float32"):
        raise ValueError("one of auto, bfloat16, float16, float32")
    return name


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("a JSON object")
    return value


def api_key(text: str) -> str:
    if not text or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("a key of printable ASCII characters without spaces, and not empty")
    if text == HIDDEN:
        raise ValueError("the key itself, not the placeholder of --print-config")
    return text


def named_model(text: str) -> dict[str, Any]:
    """NAME=PATH, or an entry of the configuration file as a JSON object; its keys are looked at in pipeline.served."""
    if text.startswith("{"):
        return json_object(text)
    label, sign, path = text.partition("=")
    if not sign or not path:
        raise ValueError("NAME=PATH (the model to serve first is given without a flag)")
    return {"name": name(label), "path": path}


def name(text: str) -> str:
    if not text or len(text) > 256 or not text.isprintable():
        raise ValueError("a printable name of 1 to 256 characters")
    return text


def host(text: str) -> str:
    if not text or not text.isprintable() or " " in text:
        raise ValueError("an address or a host name")
    return text.strip("[]")


def zmq_endpoint(text: str) -> str:
    """ipc:///absolute/path or tcp://host:port."""
    if text.startswith("ipc:///") and len(text) < 100:
        return text
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    if text.startswith("tcp://") and host and port.isdigit() and 0 < int(port) < 65536:
        return text
    raise ValueError("ipc:///path (an absolute path of less than 90 characters) or tcp://host:port")
