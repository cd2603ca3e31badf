"""CORS: which web pages may call the API from a browser (off until the operator names origins)."""

from __future__ import annotations

from collections.abc import Sequence

from img_serving.api.exchange import Exchange

_EXPOSED = (
    b"x-request-id, x-job-id, x-backend, x-attempts, x-queue-ms, x-queue-eta-seconds, x-img-serving-ignored, x-should-retry, "
    b"retry-after, retry-after-ms, location, idempotent-replayed, preference-applied"
)


class CrossOrigin:
    """Answers preflights and marks replies for the origins in `allowed` ("*" allows every one)."""

    def __init__(self, allowed: Sequence[str]) -> None:
        """`allowed` are origins such as "https://example.org"."""
        self._any = "*" in allowed
        self._allowed = {origin.rstrip("/").encode() for origin in allowed}

    def headers(self, exchange: Exchange) -> list[tuple[bytes, bytes]]:
        """What a reply says to an allowed origin; nothing to others."""
        if not self._allowed:
            return []
        origin = exchange.header(b"origin")
        if origin is None or not (self._any or origin in self._allowed):
            return []
        return [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            (b"access-control-expose-headers", _EXPOSED),
            (b"vary", b"origin"),
        ]

    def preflight(self, exchange: Exchange, methods: bytes) -> list[tuple[bytes, bytes]]:
        """What the answer to a preflight adds."""
        if exchange.header(b"access-control-request-method") is None or not self.headers(exchange):
            return []
        wanted = exchange.header(b"access-control-request-headers") or b"authorization, content-type, x-api-key"
        return [
            (b"access-control-allow-methods", methods),
            (b"access-control-allow-headers", wanted),
            (b"access-control-max-age", b"600"),
        ]
