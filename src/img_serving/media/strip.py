"""Taking what tells about a picture out of its file, at the level of chunks: no pixel is decoded, none changes.

Image servers write prompts, seeds and whole workflows into their files: A1111 into PNG text chunks, or EXIF where it saves JPEG
or WebP; ComfyUI into PNG text chunks. Formats: PNG (see `media.png`), JPEG (ITU-T T.81, annex B), WebP (RFC 9649).
"""

from __future__ import annotations

import re
from struct import Struct

from img_serving.domain.images import MediaType
from img_serving.media import png

_SOI, _EOI = b"\xff\xd8", b"\xff\xd9"
_SCAN, _FIRST_APP, _LAST_APP, _COMMENT = 0xDA, 0xE0, 0xEF, 0xFE
_JFIF, _ICC, _ADOBE = 0xE0, 0xE2, 0xEE

# Inside a scan, FF stands before 00 (a plain FF), a restart marker, or more FF; anything else is a marker. Only the last FF of
# a row is looked for: a pattern that also takes those before it would look at each row once for every byte of it.
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")

_SHOWN_WEBP = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ANIM", b"ANMF", b"ICCP"})
_HAS_EXIF_OR_XMP = 0x08 | 0x04
_U32 = Struct("<I")


def strip_metadata(data: bytes, media_type: MediaType) -> bytes:
    """The same picture without text, EXIF, XMP, IPTC, comments and unknown chunks, and without bytes behind its end.

    Colour profiles stay, for they change how it looks. An EXIF orientation goes with the rest: what an engine drew has none.
    Bytes that need no change come back as the same object.

    Raises:
        ValueError: malformed, or not of the media type.
    """
    if media_type == "image/png":
        return png.strip_metadata(data)
    return _strip_jpeg(data) if media_type == "image/jpeg" else _strip_webp(data)


def _strip_jpeg(data: bytes) -> bytes:
    if not data.startswith(_SOI):
        raise ValueError("not a JPEG: the start is missing")
    view = memoryview(data)
    parts: list[bytes | memoryview] = [_SOI]
    at = 2
    while True:
        start = at
        while at < len(data) and data[at] == 0xFF:
            at += 1  # any number of fill bytes may stand before a marker
        if at == start or at >= len(data):
            raise ValueError(f"the JPEG has no marker at byte {start}")
        marker = data[at]
        if marker == _EOI[1]:
            parts.append(_EOI)
            break
        stop = at + 1 + int.from_bytes(view[at + 1 : at + 3], "big")
        if stop < at + 3 or stop > len(data):
            raise ValueError(f"the JPEG ends inside its segment at byte {start}")
        if _is_shown(marker, view[at + 3 : stop]):
            parts += (b"\xff", view[at:stop])
        at = stop
        if marker == _SCAN:
            following = _MARKER_IN_SCAN.search(data, at)
            if following is None:
                raise ValueError("the JPEG ends inside its scan")
            parts.append(view[at : following.start()])
            at = following.start()
    return data if sum(map(len, parts)) == len(data) else b"".join(parts)


def _is_shown(marker: int, body: memoryview) -> bool:
    """Whether a segment changes how the picture looks."""
    if marker == _COMMENT:
        return False
    if not _FIRST_APP <= marker <= _LAST_APP:
        return True
    return (marker == _JFIF and bytes(body[:4]) == b"JFIF") or (
        (marker == _ICC and bytes(body[:11]) == b"ICC_PROFILE") or (marker == _ADOBE and bytes(body[:5]) == b"Adobe")
    )


def _strip_webp(data: bytes) -> bytes:
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        raise ValueError("not a WebP: the head is missing")
    view = memoryview(data)
    end = 8 + _U32.unpack_from(data, 4)[0]
    if end > len(data):
        raise ValueError("the WebP ends before its RIFF does")
    parts: list[bytes | memoryview] = []
    at = 12
    while at + 8 <= end:
        kind, size = data[at : at + 4], _U32.unpack_from(data, at + 4)[0]
        stop = at + 8 + size + (size & 1)
        if at + 8 + size > end:
            raise ValueError("a WebP chunk is longer than its file")
        if kind == b"VP8X" and size >= 10 and data[at + 8] & _HAS_EXIF_OR_XMP:
            parts += (view[at : at + 8], bytes((data[at + 8] & ~_HAS_EXIF_OR_XMP,)), view[at + 9 : stop])
        elif kind in _SHOWN_WEBP:
            parts.append(view[at:stop])
        at = stop
    length = sum(map(len, parts))
    if 12 + length == len(data):
        return data
    return b"".join([b"RIFF", _U32.pack(4 + length), b"WEBP", *parts])
