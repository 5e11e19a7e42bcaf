"""Which web pages may call this server: the CORS headers of answers and preflights. Run by the frontend.

Off unless --allowed-origins names somebody: then a browser shows no page an answer of ours, whatever this file does.
"""
from __future__ import annotations

import re
from collections.abc import Iterable

from sanic.request import Request as HttpRequest

from pipeline.config import CorsConfig

MAX_AGE_S = 600                  # for how long a browser may remember a preflight
EXPOSED = "X-Request-Id, openai-processing-ms, Retry-After"
_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]*")
_SAFELISTED = frozenset({"accept", "accept-language", "content-language", "content-type"})


class Cors:
    """The rules of one server."""

    def __init__(self, config: CorsConfig) -> None:
        self._origins = frozenset(config.origins)
        self._all = "*" in self._origins
        self._methods = frozenset(config.methods)
        self._any_header = "*" in config.headers
        self._headers = frozenset(h.lower() for h in config.headers) | _SAFELISTED
        self._credentials = config.credentials

    def preflight(self, http: HttpRequest, methods: Iterable[str]) -> bool:
        """Whether this is a browser's question ahead of a call that may be made: it carries no key.

        What may not be called is refused like any other call without a key, so that nothing is learnt from it.
        """
        if http.method != "OPTIONS" or not self._allows(http.headers.getone("origin", "")):
            return False
        method = http.headers.getone("access-control-request-method", "")
        return method in methods and ("*" in self._methods or method in self._methods) and self._may_send(http)

    def headers(self, http: HttpRequest) -> dict[str, str]:
        """What an answer to this call carries; nothing for callers that are no pages, or none that may."""
        origin = http.headers.getone("origin", "")
        if not origin or not self._origins:
            return {}
        found = {"Vary": "Origin"}
        if not self._allows(origin):
            return found
        found["Access-Control-Allow-Origin"] = "*" if self._all else origin
        found["Access-Control-Expose-Headers"] = EXPOSED
        if self._credentials:
            found["Access-Control-Allow-Credentials"] = "true"
        asked = http.headers.getone("access-control-request-method", "")
        if http.method == "OPTIONS" and asked and ("*" in self._methods or asked in self._methods):
            found["Access-Control-Allow-Methods"] = asked
            found["Access-Control-Max-Age"] = str(MAX_AGE_S)
            wanted = http.headers.getone("access-control-request-headers", "")
            if wanted and self._may_send(http):
                found["Access-Control-Allow-Headers"] = wanted
        return found

    def _allows(self, origin: str) -> bool:
        return bool(origin) and (self._all or origin in self._origins)

    def _may_send(self, http: HttpRequest) -> bool:
        """Whether a page may send the headers that its preflight names."""
        wanted = http.headers.getone("access-control-request-headers", "")
        if _NAMES.fullmatch(wanted) is None:
            return False
        return self._any_header or all(n.strip() in self._headers for n in wanted.lower().split(",") if n.strip())
