"""The server's end of TLS, with a certificate that tests make."""

from __future__ import annotations

import ssl
from pathlib import Path


def server_side(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context
