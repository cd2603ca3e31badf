"""What a file is, how large its picture is, and whether it is all there: by magic bytes and headers, never by decoding.

Formats: PNG (https://www.w3.org/TR/png-3/), JPEG (ITU-T T.81, annex B) and WebP (RFC 9649).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from img_serving.domain.images import MediaType
from img_serving.media import png

SIDE_LIMIT = 65535
"""Width and height are from 1 to this: the most that JPEG can name."""

# T.81 table B.1: start-of-frame markers are C0 to CF but for DHT (C4), JPG (C8) and DAC (CC).
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_LONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_END, _SCAN = 0xD9, 0xDA
_FILL = re.compile(rb"\xff+")

SEGMENTS_LIMIT = 10_000
"""Segments of a JPEG's head, or chunks of a WebP (one a frame of an animation): more only hold up whoever walks over them."""

# Cameras and object stores pad the end of a JPEG with these; none of them can be the last byte of a complete one.
_PADDING = b"\x00\xff\r\n\t "
_PADDING_LIMIT = 64 * 1024

_WEBP_PICTURES = frozenset({b"VP8 ", b"VP8L", b"ANMF"})


def sniff(data: bytes | bytearray | memoryview) -> MediaType | None:
    """The media type by magic bytes; None for everything but PNG, JPEG and WebP (GIF, AVIF, HTML, nothing at all …)."""
    head = bytes(data[:12])
    if head.startswith(png.SIGNATURE):
        return "image/png"
    if head.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if head.startswith(b"RIFF") and head[8:] == b"WEBP":
        return "image/webp"
    return None


def dimensions(data: bytes | bytearray | memoryview) -> tuple[int, int]:
    """Width and height in pixels, from headers; the rest of the picture may be missing.

    Raises:
        ValueError: not a picture that we know, malformed, or a side that is not from 1 to `SIDE_LIMIT`.
    """
    media_type = sniff(data)
    view = memoryview(data)
    if media_type == "image/png":
        width, height = png.read_header(view)
    elif media_type == "image/jpeg":
        width, height, _ = _read_jpeg(view, to_scan=False)
    elif media_type == "image/webp":
        width, height = _read_webp(view)
    else:
        raise ValueError("not a picture: neither PNG, JPEG nor WebP")
    if not (0 < width <= SIDE_LIMIT and 0 < height <= SIDE_LIMIT):
        raise ValueError(f"not a picture: it says that it is {width}x{height}")
    return width, height


def check_picture(data: bytes | bytearray | memoryview) -> tuple[MediaType, int, int]:
    """The media type, width and height of a picture that is complete: its structure leads to its end.

    Raises:
        ValueError: "not a picture: …" or "cut short: …".
    """
    size = png.size_if_complete(data) if isinstance(data, bytes) else None
    if size is not None and max(size) <= SIDE_LIMIT:
        return "image/png", *size
    media_type = sniff(data)
    if media_type is None:
        raise ValueError("not a picture: neither PNG, JPEG nor WebP")
    try:
        width, height = dimensions(data)
    except ValueError as error:
        reason = str(error)
        raise ValueError(reason if reason.startswith(("not a", "cut")) else f"not a picture: {reason}") from None
    view = memoryview(data)
    if media_type == "image/png":
        complete = png.is_complete(view)
    elif media_type == "image/jpeg":
        complete = _is_complete_jpeg(view)
    else:
        complete = _is_complete_webp(view)
    if not complete:
        raise ValueError(f"cut short: the {media_type} of {len(view)} bytes does not reach its end")
    return media_type, width, height


def _read_jpeg(view: memoryview, *, to_scan: bool) -> tuple[int, int, int]:
    """Width, height, and where the first scan's header ends (-1 unless `to_scan`). Raises ValueError."""
    width = height = 0
    at = 2
    for _ in range(SEGMENTS_LIMIT):
        fill = _FILL.match(view, at)  # any number of fill bytes may stand before a marker
        if fill is None:
            reason = (
                "not a picture: a JPEG marker is missing"
                if at < len(view)
                else "cut short: the JPEG ends inside its headers"
            )
            raise ValueError(reason)
        at = fill.end()
        if at >= len(view):
            raise ValueError("cut short: the JPEG ends inside its headers")
        marker = view[at]
        at += 1
        if marker in _LONE_MARKERS:
            continue
        if marker == _END:
            raise ValueError("not a picture: the JPEG ends before its first scan")
        if at + 2 > len(view):
            raise ValueError("cut short: the JPEG ends inside its headers")
        length = view[at] << 8 | view[at + 1]
        if length < 2:
            raise ValueError("not a picture: a JPEG segment of impossible length")
        if marker in _FRAMES:
            if length < 8 or at + 7 > len(view):
                raise ValueError("cut short: the JPEG ends inside its frame header")
            if width:
                raise ValueError("not a picture: a JPEG with two frames, whose sizes may differ")
            height = view[at + 3] << 8 | view[at + 4]
            width = view[at + 5] << 8 | view[at + 6]
            if not to_scan:
                return width, height, -1
        at += length
        if marker == _SCAN:
            if not width:
                raise ValueError("not a picture: a JPEG scan without a frame")
            return width, height, at
    raise ValueError(f"not a picture: a JPEG with more than {SEGMENTS_LIMIT} segments before its first scan")


def _is_complete_jpeg(view: memoryview) -> bool:
    try:
        *_, scan = _read_jpeg(view, to_scan=True)
    except ValueError:
        return False
    tail = bytes(view[max(scan, len(view) - _PADDING_LIMIT) :]) if scan < len(view) else b""
    return tail.rstrip(_PADDING).endswith(b"\xff\xd9")


def _read_webp(view: memoryview) -> tuple[int, int]:
    """RFC 9649, 2.5 to 2.7: the first chunk names the size, each kind in its own way. Raises ValueError."""
    head = bytes(view[12:30])
    kind, body = head[:4], head[8:]
    if kind == b"VP8 " and len(body) >= 10:
        if body[3:6] != b"\x9d\x01\x2a":
            raise ValueError("not a picture: the WebP's key frame has no start code")
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if kind == b"VP8L" and len(body) >= 5:
        if body[0] != 0x2F:
            raise ValueError("not a picture: the lossless WebP has no signature")
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if kind == b"VP8X" and len(body) >= 10:
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind in {b"VP8 ", b"VP8L", b"VP8X"} or len(kind) < 4:
        raise ValueError("cut short: the WebP ends inside its headers")
    raise ValueError("not a picture: the WebP's first chunk is none that it may be")


def _is_complete_webp(view: memoryview) -> bool:
    """Whether the file holds all that RIFF announces, and that is whole chunks with a picture among them."""
    stop = 8 + int.from_bytes(view[4:8], "little")
    if stop > len(view):
        return False
    try:
        return any(kind in _WEBP_PICTURES for kind in list(_webp_chunks(view, stop)))
    except ValueError:
        return False


def _webp_chunks(view: memoryview, stop: int) -> Iterator[bytes]:
    at = 12
    for _ in range(SEGMENTS_LIMIT):
        if at + 8 > stop:
            return
        yield bytes(view[at : at + 4])
        size = int.from_bytes(view[at + 4 : at + 8], "little")
        at += 8 + size
        if at > stop:
            raise ValueError("cut short: a WebP chunk is longer than its file")
        at += size & 1  # chunks begin at even offsets
    raise ValueError(f"not a picture: a WebP of more than {SEGMENTS_LIMIT} chunks")
