"""The reading of one HTTP/1.1 reply, without I/O: gives room for bytes, is told how many came, knows when it is complete."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from functools import lru_cache

from httptools import HttpParserCallbackError, HttpParserError, HttpResponseParser

from img_serving.ports import UpstreamReply

SCRATCH_BYTES = 64 * 1024
"""Room for heads, small bodies and chunks: one buffer for all connections of a loop, so waiting requests cost none."""

_BARREN_LIMIT_BYTES = 64 * 1024
_HEADER_LIMIT = 256
_FIRST_ROOM_BYTES = 4 * 1024 * 1024
_KEEP_ALIVE_TIMEOUT = re.compile(r"\btimeout\s*=\s*(\d{1,9})", re.ASCII | re.IGNORECASE)
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
_BARE_DEFLATE = -zlib.MAX_WBITS


class BadReply(Exception):
    """What came is no reply that we take; the message says why and quotes nothing of it."""


class ReplyReader:
    """Reads one reply after another; `begin` readies it for the next.

    A body of known length is received into its place, so 2 MB cost no joining and no copy but the kernel's. A length is
    believed only as far as bytes come: room grows from 4 MiB by doubling.
    """

    __slots__ = (
        "_barren_bytes",
        "_body",
        "_head_only",
        "_head_read",
        "_headers",
        "_interim",
        "_length",
        "_limit_bytes",
        "_on_event_bytes",
        "_pairs",
        "_parser",
        "_place",
        "_scratch",
        "_size",
        "_status",
        "_streams",
        "_until_close",
        "complete",
        "reusable",
        "started",
    )

    def __init__(self, scratch: memoryview) -> None:
        """`scratch` is shared with other readers: nothing stays in it after `received` returns."""
        self._scratch = scratch
        self._parser: HttpResponseParser | None = None
        self.begin(head_only=False, limit_bytes=0)

    def begin(
        self, *, head_only: bool, limit_bytes: int, on_event_bytes: Callable[[bytes], None] | None = None
    ) -> None:
        """Be ready for a reply (to HEAD if `head_only`) of at most `limit_bytes` of body.

        The body of a good `text/event-stream` goes to `on_event_bytes` piece by piece, if there is one, and is not kept.
        """
        self._on_event_bytes = on_event_bytes
        self._streams = False
        self.started = False
        self.complete = False
        self.reusable = False
        self._head_only = head_only
        self._limit_bytes = limit_bytes
        self._head_read = False
        self._interim = False
        self._until_close = False
        self._status = 0
        self._pairs: list[tuple[str, str]] = []
        self._headers: dict[str, str] = {}
        self._barren_bytes = 0
        self._length = -1
        self._size = 0
        self._body: bytes | bytearray = b""
        self._place: bytearray | None = None

    def forget(self) -> None:
        """Let go of the parser, which refers back to this reader; done when the connection is gone."""
        self._parser = None

    def room(self) -> memoryview:
        """Where the next bytes belong: never empty, as uvloop takes an empty view for a fatal error.

        A place grows here and not in `received`: during that the loop still holds the last view of it.
        """
        place = self._place
        if place is None:
            return self._scratch
        if self._size == len(place):
            place.extend(bytes(min(self._length - self._size, self._size)))
        return memoryview(place)[self._size :]

    def received(self, count: int) -> bool:
        """Take `count` bytes that were put into `room()`; True when the reply is complete.

        Raises:
            BadReply: it is not HTTP, or more than is allowed.
        """
        self.started = True
        if self._place is not None:
            self._size += count
            if self._size < self._length:
                return False
            self._body, self._place = self._place, None
            self._parser = None  # it still waits for the body that went past it
            self.complete = True
            return True

        parser = self._parser
        if parser is None:
            parser = self._parser = HttpResponseParser(self)
        size = self._size
        try:
            parser.feed_data(self._scratch[:count])
        except HttpParserError as error:
            if not self.complete:
                raise _reason(error) from None  # `from error` would tie the two into a cycle
            self.reusable = False  # a good reply with rubbish behind it
        if self.complete:
            return True
        if self._size > size:
            self._barren_bytes = 0
        else:
            # One bound for endless heads, interim replies, chunk extensions and trailers alike.
            self._barren_bytes += count
            if self._barren_bytes > _BARREN_LIMIT_BYTES:
                raise BadReply("the reply's headers are too large")
        if self._length > self._size:
            self._place = bytearray(min(self._length, max(_FIRST_ROOM_BYTES, 2 * self._size)))
            self._place[: self._size] = self._body
        return False

    def ended(self) -> bool:
        """The peer sends no more: does that complete the reply?"""
        if self._until_close and not self.complete:
            self.complete = True
            return True
        return False

    def reply(self) -> UpstreamReply:
        """Hand over the complete reply, its body decoded should the server have compressed it unasked.

        Raises:
            BadReply: the coding is unknown or broken, or the decoded body over the limit.
        """
        headers, body = self._headers, self._body
        self._body = b""  # an idle connection holds no picture
        self._on_event_bytes = None
        if body:
            coding = headers.get("content-encoding")
            if coding is not None:
                body = _decoded(body, coding.strip().lower(), self._limit_bytes)
                del headers["content-encoding"]
                headers["content-length"] = str(len(body))
        return UpstreamReply(self._status, headers, body)

    def idle_limit_seconds(self) -> float | None:
        """For how long the server keeps the idle connection, less a second for the way; None if it did not tell."""
        keep_alive = self._headers.get("keep-alive")
        if keep_alive is None:
            return None
        found = _KEEP_ALIVE_TIMEOUT.search(keep_alive)
        return None if found is None else float(found[1]) - 1.0

    # What the parser calls.

    def on_message_begin(self) -> None:
        """A second message behind a complete one: nobody asked for it."""
        if self.complete:
            self.reusable = False

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; trailers are let go."""
        if self._head_read:
            return
        if len(self._pairs) >= _HEADER_LIMIT:
            raise BadReply("the reply has too many headers")
        self._pairs.append((_lower(name), value.strip().decode("latin-1")))

    def on_headers_complete(self) -> None:
        """Decide how the body ends (RFC 9112, 6.3); interim replies (100, 103) are skipped."""
        if self._head_read:
            return
        parser = self._parser
        assert parser is not None  # noqa: S101 - it is calling
        status = parser.get_status_code()
        if status == 101:
            raise BadReply("the reply switches protocols, unasked")
        if status < 200:
            self._interim = True
            self._pairs = []
            return
        self._interim = False
        self._head_read = True
        self._status = status
        self._headers = headers = dict(self._pairs)
        self.reusable = parser.should_keep_alive()
        if self._head_only:
            self.complete = True
            self._parser = None  # it does not know of HEAD and waits for a body
            return
        if status in {204, 304}:
            return
        if self._on_event_bytes is not None:
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            self._streams = 200 <= status < 300 and kind == "text/event-stream"
            if self._streams and headers.get("content-encoding", "identity").strip().lower() != "identity":
                raise BadReply("the event stream has a content coding that was not asked for")
        coding = headers.get("transfer-encoding")
        if coding is not None:
            if coding.strip().lower() != "chunked":
                raise BadReply("the reply has a transfer coding that was not asked for")
            return
        length = headers.get("content-length")
        if length is None:
            self._until_close = True
            return
        if self._streams:
            return  # the parser counts it
        self._length = int(length)
        if self._length > self._limit_bytes:
            raise self._too_large()

    def on_body(self, piece: bytes) -> None:
        """Keep a piece of the body; the only one is kept as it is."""
        if self.complete:
            self.reusable = False
            return
        if self._interim:
            raise BadReply("an interim reply has a body")
        size = self._size + len(piece)
        if size > self._limit_bytes:
            raise self._too_large()
        if self._streams:
            self._size = size
            assert self._on_event_bytes is not None  # noqa: S101 - it made the reply a stream
            self._on_event_bytes(piece)
            return
        if not self._size:
            self._body = piece
        elif isinstance(self._body, bytearray):
            self._body += piece
        else:
            self._body = bytearray(self._body)
            self._body += piece
        self._size = size

    def on_message_complete(self) -> None:
        """The last byte was read, unless it was an interim reply's."""
        if not self._interim:
            self.complete = True

    def _too_large(self) -> BadReply:
        return BadReply(f"the reply is over {self._limit_bytes} bytes")


@lru_cache(maxsize=256)
def _lower(name: bytes) -> str:
    """Header names repeat: one string each serves all replies."""
    return name.lower().decode("latin-1")


def _reason(error: HttpParserError) -> Exception:
    """What stopped the parser: our own refusal, a bug of ours (httptools wraps both), or bytes that are not HTTP."""
    if isinstance(error, HttpParserCallbackError) and isinstance(error.__context__, Exception):
        return error.__context__
    return BadReply("the reply is not HTTP")


_INFLATED_LIMIT_BYTES = 64 << 20


def _decoded(body: bytes | bytearray, coding: str, limit_bytes: int) -> bytes | bytearray:
    """Undo gzip or deflate without ever holding more than `limit_bytes` of the result."""
    if coding == "identity":
        return body
    # nobody asked for compression: what comes so is no picture, and may unpack to a thousand times its size
    limit_bytes = min(limit_bytes, _INFLATED_LIMIT_BYTES)
    if coding not in {"gzip", "x-gzip", "deflate"}:
        raise BadReply("the reply has a content coding that was not asked for")
    try:
        return _inflated(body, _GZIP_OR_ZLIB, limit_bytes)
    except zlib.error:
        if coding != "deflate":
            raise BadReply("the reply's compression is broken") from None
    try:
        return _inflated(body, _BARE_DEFLATE, limit_bytes)  # what some servers have always meant by "deflate"
    except zlib.error:
        raise BadReply("the reply's compression is broken") from None


def _inflated(body: bytes | bytearray, window_bits: int, limit_bytes: int) -> bytes:
    inflater = zlib.decompressobj(window_bits)
    plain = inflater.decompress(body, limit_bytes + 1)
    if len(plain) > limit_bytes:
        raise BadReply(f"the reply is over {limit_bytes} bytes when decompressed")
    if not inflater.eof:
        raise BadReply("the reply's compression is cut short")
    if inflater.unused_data:
        raise BadReply("the reply goes on behind its compressed end")
    return plain
