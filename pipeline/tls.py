"""HTTPS: the context that a TlsConfig describes, checked by the command line and used, and reloaded, by the frontends.

Never logs what the files hold.
"""
from __future__ import annotations

import ssl
from pathlib import Path

from pipeline.config import TlsConfig
from pipeline.errors import StartError
from pipeline.exits import CONFIG


def context(tls: TlsConfig) -> ssl.SSLContext:
    """TLS 1.2 or newer with the certificate of `tls`; StartError with the file that is wrong."""
    made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    made.minimum_version = ssl.TLSVersion.TLSv1_2
    made.set_alpn_protocols(["http/1.1"])
    made.verify_mode = ssl.VerifyMode(tls.cert_reqs)
    load(made, tls)
    if tls.cert_reqs and tls.ca_certs is None:
        raise StartError(CONFIG, "--ssl-cert-reqs needs --ssl-ca-certs: without authorities no client could be believed.")
    return made


def load(made: ssl.SSLContext, tls: TlsConfig) -> None:
    """Read the files into a context; connections from now on see them. StartError leaves what was there before."""
    assert tls.certfile is not None
    for path, what in ((tls.certfile, "certificate"), (tls.keyfile, "private key"), (tls.ca_certs, "authority")):
        if path is not None and not Path(path).is_file():
            raise StartError(CONFIG, f"The {what} file {path} does not exist.")
    try:
        # An encrypted key would ask on the terminal: an empty answer makes it an error instead.
        made.load_cert_chain(tls.certfile, tls.keyfile, password=lambda: "")
    except (OSError, ValueError):
        raise StartError(CONFIG, f"The certificate {tls.certfile} and its private key cannot be used: both must be PEM, "
                                 "belong together, and not be encrypted.") from None
    if tls.ca_certs is not None:
        try:
            made.load_verify_locations(tls.ca_certs)
        except (OSError, ValueError):
            raise StartError(CONFIG, f"The authority file {tls.ca_certs} holds no certificate in PEM form.") from None


def stamp(tls: TlsConfig) -> tuple[int, ...]:
    """Changes when one of the files does."""
    found = []
    for path in (tls.certfile, tls.keyfile, tls.ca_certs):
        try:
            found.append(Path(path).stat().st_mtime_ns if path is not None else 0)
        except OSError:
            found.append(-1)
    return tuple(found)
