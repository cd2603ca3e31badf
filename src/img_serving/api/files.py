"""`/images/{id}.{ext}`: stored artifacts, with ranges and caching. No key: their names cannot be guessed."""

from __future__ import annotations

import re
from email.utils import formatdate

from img_serving.api.exchange import Exchange, Reply
from img_serving.api.services import Services
from img_serving.domain.errors import GatewayError, NotFound

_RANGE = re.compile(rb"bytes=(\d{0,18})-(\d{0,18})")


class RangeNotSatisfiable(GatewayError):
    """The range starts behind the end of the file."""

    kind = "invalid_request_error"
    default_code = "range_not_satisfiable"
    status = 416


class Files:
    """Handler of the artifact route."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def get(self, exchange: Exchange) -> Reply:
        """`GET /images/{name}`: the whole picture or one range of it (RFC 9110, section 14)."""
        name = exchange.variables["name"]
        stored = await self._services.store.find(name)
        if stored is None:
            raise NotFound("this image does not exist, or has expired", code="image_not_found")
        # an artifact never changes under its name, so the name is its version
        etag = b'"%s"' % name.partition(".")[0].encode()
        headers = [
            (b"etag", etag),
            (b"last-modified", formatdate(stored.modified_at, usegmt=True).encode()),
            (b"cache-control", b"public, max-age=31536000, immutable"),
            (b"accept-ranges", b"bytes"),
            (b"x-content-type-options", b"nosniff"),
            (b"content-disposition", b'inline; filename="%s"' % name.encode()),
        ]
        if _matches(exchange.header(b"if-none-match"), etag):
            return Reply(304, headers=headers)
        size = stored.size_bytes
        start, stop, status = 0, size, 200
        asked = exchange.header(b"range")
        if_range = exchange.header(b"if-range")
        if asked is not None and (if_range is None or if_range == etag):
            try:
                part = _range_of(asked, size)
            except RangeNotSatisfiable:
                exchange.extra_headers.append((b"content-range", b"bytes */%d" % size))
                raise
            if part is not None:
                start, stop = part
                status = 206
                headers.append((b"content-range", b"bytes %d-%d/%d" % (start, stop - 1, size)))
        media_type = stored.media_type.encode()
        if exchange.method == "HEAD":
            return Reply(status, headers=headers, media_type=media_type, length=stop - start)
        self._services.metrics.artifacts.add("served")
        stream = self._services.store.read(name, start, stop)
        return Reply(status, headers=headers, media_type=media_type, stream=stream, length=stop - start)


def _matches(header: bytes | None, etag: bytes) -> bool:
    if header is None:
        return False
    return any(one.strip().removeprefix(b"W/") in {etag, b"*"} for one in header.split(b","))


def _range_of(header: bytes, size: int) -> tuple[int, int] | None:
    """(start, stop) of a single range; None for what RFC 9110 lets a server answer in full (several ranges, other units).

    Raises:
        RangeNotSatisfiable: it lies behind the end.
    """
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == (b"", b""):
        return None
    first, last = match.groups()
    if not first:
        start, stop = max(0, size - int(last)), size
    else:
        start = int(first)
        stop = min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return None
    if start >= size or start >= stop:
        raise RangeNotSatisfiable(f"the image has {size} bytes")
    return start, stop
