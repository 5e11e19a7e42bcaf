"""The certificate of an HTTPS server: read at start, again on SIGHUP, and with --enable-ssl-refresh when it changes.

Connections that are open keep the certificate that they began with. Run by the frontend.
"""
from __future__ import annotations

import asyncio
import logging
import ssl

from pipeline import tls
from pipeline.config import TlsConfig
from pipeline.errors import StartError

LOOK_S = 10.0                    # how often the files are looked at
log = logging.getLogger(__name__)


class Certificate:
    """Owns the TLS context of one frontend."""

    def __init__(self, config: TlsConfig) -> None:
        """StartError when the files cannot be used."""
        self._config = config
        self.context: ssl.SSLContext = tls.context(config)
        self._seen = tls.stamp(config)
        if config.refresh:
            asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def reload(self) -> None:
        """Read the files again; what cannot be used leaves the old certificate in force."""
        self._seen = tls.stamp(self._config)
        try:
            tls.load(self.context, self._config)
        except StartError as error:
            log.error("the certificate stays as it is: %s", error.message)

    def _look(self) -> None:
        if tls.stamp(self._config) != self._seen:
            self.reload()
            log.warning("the certificate's files have changed and were read again")
        asyncio.get_running_loop().call_later(LOOK_S, self._look)
