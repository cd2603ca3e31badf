"""`/openapi.json`, `/docs` and `/`: the API told to programs and to people, without anything fetched from elsewhere."""

from __future__ import annotations

from importlib import resources

import msgspec

from img_serving.api.exchange import Exchange, Reply
from img_serving.api.openapi import document
from img_serving.api.services import Services


class Docs:
    """Handlers of the documentation routes."""

    def __init__(self, services: Services) -> None:
        self._version = services.version
        self._document: bytes | None = None

    async def openapi(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /openapi.json`: made when first asked for, off the start path."""
        if self._document is None:
            self._document = msgspec.json.encode(document(self._version))
        return Reply(200, (self._document,))

    async def page(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /docs`: a page that reads /openapi.json and lets one try the API."""
        html = resources.files("img_serving.api").joinpath("docs.html").read_bytes()
        policy = b"default-src 'self' 'unsafe-inline'; img-src 'self' data: blob: http: https:"
        headers = [(b"content-security-policy", policy)]
        return Reply(200, (html,), media_type=b"text/html; charset=utf-8", headers=headers)

    async def index(self, exchange: Exchange) -> Reply:  # noqa: ARG002 - a handler's shape
        """`GET /`: where to look next."""
        body = {
            "name": "img-serving",
            "version": self._version,
            "docs": "/docs",
            "openapi": "/openapi.json",
            "health": "/health",
        }
        return Reply(200, (msgspec.json.encode(body),))
