"""Errors that a user can reach: one class, one catalogue of codes, one sentence each.

Any stage may raise them; the frontend turns them into OpenAI-shaped bodies. Texts come from our own catalogue or
from our own validation, never from ``str(exc)`` of somebody else's exception, so that no path or address leaks.
"""
from __future__ import annotations

from dataclasses import dataclass

# code -> (HTTP status, OpenAI error type, may the client retry)
CATALOGUE: dict[str, tuple[int, str, bool]] = {
    "invalid_request": (400, "invalid_request_error", False),
    "invalid_value": (400, "invalid_request_error", False),
    "unsupported_parameter": (400, "invalid_request_error", False),
    "context_length_exceeded": (400, "invalid_request_error", False),
    "no_token_left": (400, "invalid_request_error", False),
    "invalid_api_key": (401, "invalid_request_error", False),
    "forbidden_host": (403, "invalid_request_error", False),
    "model_not_found": (404, "invalid_request_error", False),
    "not_found": (404, "invalid_request_error", False),
    "method_not_allowed": (405, "invalid_request_error", False),
    "request_timeout": (408, "invalid_request_error", True),
    "payload_too_large": (413, "invalid_request_error", False),
    "unsupported_media_type": (415, "invalid_request_error", False),
    "expectation_failed": (417, "invalid_request_error", False),
    "server_overloaded": (429, "rate_limit_error", True),
    "internal_error": (500, "server_error", True),
    "numerical_error": (500, "server_error", False),
    "out_of_memory": (500, "server_error", True),
    "poisoned_request": (500, "server_error", False),
    "insufficient_storage": (503, "server_error", True),
    "engine_unavailable": (503, "server_error", True),
    "draining": (503, "server_error", True),
    "timeout": (504, "server_error", True),
}


@dataclass(slots=True, eq=False)
class QuartetError(Exception):
    """An error with a code of the catalogue, one sentence for the user and the parameter it is about."""

    code: str
    message: str
    param: str | None = None

    def __post_init__(self) -> None:
        assert self.code in CATALOGUE, self.code
        Exception.__init__(self, self.message)

    @property
    def status(self) -> int:
        return CATALOGUE[self.code][0]

    @property
    def type(self) -> str:
        return CATALOGUE[self.code][1]

    @property
    def retryable(self) -> bool:
        return CATALOGUE[self.code][2]

    def body(self) -> dict[str, dict[str, str | None]]:
        """The OpenAI-shaped JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def __str__(self) -> str:
        return self.message


def invalid(message: str, param: str | None = None) -> QuartetError:
    """A 400 for a value that is not allowed."""
    return QuartetError("invalid_value", message, param)


def unsupported(param: str) -> QuartetError:
    """A 400 for a known parameter that this server does not honour: refused by name, never ignored."""
    return QuartetError("unsupported_parameter", f"The parameter '{param}' is not supported by this server.", param)


@dataclass(slots=True, eq=False)
class StartError(Exception):
    """The launcher or a stage cannot start: one sentence and the documented exit code (see pipeline.exits)."""

    exit_code: int
    message: str

    def __post_init__(self) -> None:
        Exception.__init__(self, self.message)

    def __str__(self) -> str:
        return self.message
