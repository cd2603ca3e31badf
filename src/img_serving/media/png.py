"""PNG at the byte level: write pixels, read a size, drop metadata and prove completeness without decoding a picture.

The format is that of the PNG specification, third edition (https://www.w3.org/TR/png-3/): a signature, then chunks of
length (4 bytes, big endian), type (4 letters), body and CRC-32 of type and body.
"""

from __future__ import annotations

from collections.abc import Iterator
from struct import Struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy.typing as npt

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LENGTH_LIMIT = 2**31
"""Chunk lengths, widths and heights are below this, exclusive (PNG 7.1)."""

SHOWN_CHUNKS = frozenset(
    b"IHDR PLTE IDAT IEND tRNS gAMA cHRM sRGB iCCP pHYs sBIT bKGD cICP mDCV cLLI acTL fcTL fdAT".split(),
)
"""What changes how a picture looks; every other ancillary chunk tells about it instead, or is nobody knows what."""

_TEXT_CHUNKS = frozenset((b"tEXt", b"zTXt", b"iTXt"))

CHUNKS_LIMIT = 100_000
"""A PNG of 16 megapixels has some thousands; millions of empty ones would only hold up whoever walks over them."""

_HEADER_BYTES = 25
_LENGTH = Struct(">I")
_CHUNK_HEAD = Struct(">I4s")
_BEGINNING = SIGNATURE + b"\x00\x00\x00\x0dIHDR"
_SIZE = Struct(">II")
_UP = 2
_PIXEL_BYTES = 3
_AXES = 3


def encode_png(pixels: npt.NDArray[Any], level: int = 1) -> bytes:
    """Write pixels as an 8-bit RGB PNG: equal pixels give equal bytes, for there is no time or text inside.

    Every row is filtered by "Up" (PNG 9.2), the best of the filters that numpy can do in one pass, and ISA-L deflates.

    Args:
        pixels: uint8 of shape [height, width, 3], each side at least 1.
        level: 0 (quickest) to 3 (smallest).

    Raises:
        ValueError: another shape or type, an empty picture, or an unknown level.
    """
    import numpy as np
    from isal import isal_zlib

    if pixels.ndim != _AXES or pixels.shape[2] != _PIXEL_BYTES or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 of shape [height, width, 3], not {pixels.dtype} {list(pixels.shape)}")
    height, width, _ = pixels.shape
    if not (0 < height < LENGTH_LIMIT and 0 < width < LENGTH_LIMIT):
        raise ValueError(f"a PNG has at least one pixel, not {width}x{height}")
    if not isal_zlib.ISAL_BEST_SPEED <= level <= isal_zlib.ISAL_BEST_COMPRESSION:
        raise ValueError(f"the PNG compression level must be from 0 to 3, not {level}")

    rows = pixels.reshape(height, width * _PIXEL_BYTES)
    filtered = np.empty((height, 1 + width * _PIXEL_BYTES), np.uint8)
    filtered[:, 0] = _UP
    filtered[0, 1:] = rows[0]  # above the first row is zero, so "Up" leaves it as it is
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])  # wraps modulo 256, as the filter wants
    body = isal_zlib.compress(filtered, level)
    if len(body) >= LENGTH_LIMIT:
        raise ValueError(f"a picture of {width}x{height} does not fit one PNG chunk")

    parts = [SIGNATURE]
    header = _SIZE.pack(width, height) + bytes((8, 2, 0, 0, 0))  # 8 bits, RGB, deflate, adaptive filters, no interlace
    for kind, content in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b"")):
        checksum = isal_zlib.crc32(content, isal_zlib.crc32(kind))
        parts += (_LENGTH.pack(len(content)), kind, content, _LENGTH.pack(checksum))
    return b"".join(parts)


def read_header(data: bytes | memoryview) -> tuple[int, int]:
    """The width and height in pixels, from the first 24 bytes; the rest may be missing.

    Raises:
        ValueError: not a PNG, cut off before the size, or a size of zero or out of range.
    """
    head = bytes(data[:24])
    if not head.startswith(SIGNATURE):
        raise ValueError("not a PNG: the signature is missing")
    if len(head) < 24:
        raise ValueError(f"the PNG ends inside its header, after {len(head)} bytes")
    if head[8:16] != b"\x00\x00\x00\x0dIHDR":
        raise ValueError("the PNG does not start with an IHDR chunk of 13 bytes")
    width, height = _SIZE.unpack_from(head, 16)
    if not (0 < width < LENGTH_LIMIT and 0 < height < LENGTH_LIMIT):
        raise ValueError(f"the PNG names an impossible size: {width}x{height}")
    return width, height


def strip_metadata(data: bytes | memoryview) -> bytes:
    """The same picture without text, EXIF, time and unknown ancillary chunks, and without bytes behind its end.

    Image servers write prompts and whole workflows there. Pixels are not decoded and CRCs not looked at. Unknown critical
    chunks stay: a decoder has to refuse them itself. Bytes that need no change come back as the same object.

    Raises:
        ValueError: not a PNG, or one that is malformed or ends before its IEND chunk.
    """
    read_header(data)
    view = memoryview(data)
    parts: list[bytes | memoryview] = [SIGNATURE]
    for kind, start, stop in _chunks(view):
        if kind in SHOWN_CHUNKS or kind[:1].isupper():
            parts.append(view[start:stop])
    if isinstance(data, bytes) and sum(map(len, parts)) == len(data):
        return data
    return b"".join(parts)


def without_text(data: bytes) -> bytes:
    """What to give a decoder that wants the pixels only: the same file without its text chunks.

    Forty kilobytes of them inflate to the 64 MiB of text that Pillow is ready to keep of one picture. What is no PNG, or is
    malformed, comes back as it is: the decoder says what is wrong with it.
    """
    if not data.startswith(SIGNATURE):
        return data
    view = memoryview(data)
    parts: list[bytes | memoryview] = [SIGNATURE]
    try:
        parts += [view[start:stop] for kind, start, stop in _chunks(view) if kind not in _TEXT_CHUNKS]
    except ValueError:
        return data
    return data if sum(map(len, parts)) == len(data) else b"".join(parts)


def size_if_complete(data: bytes | memoryview) -> tuple[int, int] | None:
    """Width and height of a PNG that is complete, in one pass; None for anything else. Never raises."""
    size = len(data)
    if size < 57 or data[:16] != _BEGINNING:
        return None
    width, height = _SIZE.unpack_from(data, 16)
    if not (0 < width < LENGTH_LIMIT and 0 < height < LENGTH_LIMIT) or not _reaches_end(data, size):
        return None
    return width, height


def is_complete(data: bytes | memoryview) -> bool:
    """Whether the chunks, one after the other by their lengths, lead from IHDR over pixels to IEND. Never raises."""
    try:
        read_header(data)
    except ValueError:
        return False
    return _reaches_end(data, len(data))


def _reaches_end(data: bytes | memoryview, size: int) -> bool:
    """The same walk as `_chunks`, without making anything of each chunk: this stands on the way of every picture."""
    start, has_pixels = len(SIGNATURE) + _HEADER_BYTES, False
    for _ in range(CHUNKS_LIMIT):
        if start + 12 > size:
            return False
        length, kind = _CHUNK_HEAD.unpack_from(data, start)
        start += 12 + length
        if start > size or length >= LENGTH_LIMIT or not kind.isalpha():
            return False
        if kind == b"IDAT":
            has_pixels = True
        elif kind == b"IEND":
            return has_pixels
        elif kind == b"IHDR":
            return False  # decoders would believe the last one, and we have looked at the first
    return False


def _chunks(view: memoryview) -> Iterator[tuple[bytes, int, int]]:
    """Each chunk's type and the offsets of its first byte and past its last, up to and with IEND.

    Raises:
        ValueError: a chunk is cut off or its type is no four letters; what was before it has been given already.
    """
    start, kind = len(SIGNATURE), b""
    while kind != b"IEND":
        kind = bytes(view[start + 4 : start + 8])
        if len(kind) < 4:
            raise ValueError(f"the PNG ends at byte {len(view)}, before its IEND chunk")
        if not (kind.isalpha() and kind.isascii()):
            raise ValueError(f"the PNG chunk at byte {start} has no valid type: {kind!r}")
        (length,) = _LENGTH.unpack_from(view, start)
        stop = start + 12 + length
        if length >= LENGTH_LIMIT or stop > len(view):
            raise ValueError(f"the PNG ends inside its {kind.decode()} chunk at byte {start}")
        yield kind, start, stop
        start = stop
