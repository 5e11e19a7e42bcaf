"""Who may call: API keys and Host names. Deny by default; a secret is compared hashed, over all keys, in constant time.

Run by the frontend. Keys are never logged, and only their SHA-256 digests are kept.
"""
from __future__ import annotations

import hashlib
import hmac
import logging
from pathlib import Path

from pipeline.config import HttpConfig
from pipeline.errors import QuartetError, StartError
from pipeline.exits import CONFIG

MAX_KEY_FILE = 2**20
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1", "[::1]"})
log = logging.getLogger(__name__)


class Keys:
    """The API keys of this server; none at all leaves every route open."""

    def __init__(self, http: HttpConfig) -> None:
        self._http = http
        self._digests = self._read()

    @property
    def required(self) -> bool:
        return bool(self._digests)

    def reload(self) -> None:
        """SIGHUP: read the key file again. A file that cannot be read leaves the old keys in force."""
        try:
            self._digests = self._read()
        except StartError as error:
            log.error("the API keys stay as they are: %s", error.message)

    def allow(self, authorization: str | None) -> bool:
        """Whether the value of an Authorization header carries one of the keys."""
        if not self._digests:
            return True
        scheme, _, token = (authorization or "").partition(" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)

    def check(self, authorization: str | None) -> None:
        """QuartetError invalid_api_key unless `allow`."""
        if not self.allow(authorization):
            raise QuartetError("invalid_api_key", "A valid API key is required: 'Authorization: Bearer KEY'.")

    def _read(self) -> tuple[bytes, ...]:
        keys = list(self._http.api_keys)
        if self._http.api_key_file is not None:
            try:
                with Path(self._http.api_key_file).open(encoding="utf-8") as file:
                    lines = file.read(MAX_KEY_FILE).splitlines()
            except (OSError, ValueError):
                raise StartError(CONFIG, f"The API key file {self._http.api_key_file} cannot be read.") from None
            found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
            if not found:
                raise StartError(CONFIG, f"The API key file {self._http.api_key_file} holds no key.")
            keys += found
        if any(not key.strip() for key in keys):
            raise StartError(CONFIG, "An API key must not be empty.")
        return tuple(_digest(key) for key in keys)


class Hosts:
    """Host names under which a server that is bound to loopback answers: web pages cannot rebind a name to it."""

    def __init__(self, http: HttpConfig) -> None:
        loopback = http.uds is None and (http.host in LOOPBACK or http.host.startswith("127."))
        self._allowed = LOOPBACK | {http.host, *(h.lower() for h in http.allowed_hosts)} if loopback else None

    def check(self, host: str | None) -> None:
        """QuartetError forbidden_host for a foreign name in the Host header."""
        if self._allowed is None or not host:
            return
        name = host.strip().lower()
        name = name[:name.find("]") + 1] if name.startswith("[") else name.partition(":")[0]
        if name not in self._allowed and not name.startswith("127."):
            raise QuartetError("forbidden_host", "This server does not answer under that host name; "
                                                 "see --allowed-hosts.")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
