"""What is let in of a picture that a client sends: whole, one picture of it, upright, and nothing behind its end.

Engines and hosted APIs differ in what they make of a photograph that lies on its side, of an animation and of bytes behind a
picture's end: so none of them is sent any. Nothing is decoded but what has to be turned or cut out of an animation. Formats:
PNG (https://www.w3.org/TR/png-3/), JPEG (ITU-T T.81, annex B), WebP (RFC 9649), EXIF (CIPA DC-008, the TIFF part).
"""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct

from img_serving.domain.images import InputImage, MediaType
from img_serving.media import png
from img_serving.media.pixels import decoded
from img_serving.media.sniff import SEGMENTS_LIMIT, check_picture, sniff

MAX_SIDE = 16_384
"""Pixels: no engine takes more, and a picture of 65535 x 16 is somebody's trial."""

LOSSLESS_PIXELS = 2048 * 2048
"""A picture that has to be turned stays lossless up to here; a larger one, a camera's, becomes a good JPEG again."""

MAX_SCANS = 100
"""Of a JPEG: encoders write about ten. Each costs whoever decodes it a walk over every pixel and its sender some bytes: a file
of a hundred kilobytes could hold a processor for minutes."""

MAX_FILL_BYTES = 64 * 1024
"""Of a JPEG, before all of its markers together: they mean nothing, and decoders read them one by one."""

_JPEG_QUALITY = 95
_FILL = re.compile(rb"\xff+")
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
_STEP_BYTES = 4 << 20
_LONE_MARKERS = frozenset({0x01, *range(0xD0, 0xD8)})
_END, _SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_ENTRIES_LIMIT = 512

_U32 = Struct(">I")
_RIFF_U32 = Struct("<I")


@dataclass(slots=True)
class _Found:
    """What a walk over a file found: where the picture ends, its EXIF, and whether it moves."""

    end: int = 0
    exif: bytes = b""
    is_animated: bool = False


def take_in(data: bytes, *, max_pixels: int, max_bytes: int) -> InputImage:
    """Check a picture and make it what every backend understands alike. Takes its time: for a thread.

    Its structure is followed to its end (of a PNG with every checksum), so that nobody is sent a half one. What stands behind
    the end is cut off. One that EXIF turns is turned, and of an animation the first frame is taken.

    Raises:
        ValueError: what is wrong with it: "not a picture: …", "cut short: …", "damaged: …", or a limit that it is over.
    """
    if len(data) > max_bytes:
        raise ValueError(f"too large: {len(data)} bytes; at most {max_bytes} are allowed")
    kind = sniff(data)
    if kind is None:
        raise ValueError("not a picture: neither PNG, JPEG nor WebP")
    found = _WALKS[kind](data)
    whole = data if found.end == len(data) else data[: found.end]
    media_type, width, height = check_picture(whole)
    if max(width, height) > MAX_SIDE:
        raise ValueError(f"too large: it is {width}x{height}; a side may have at most {MAX_SIDE} pixels")
    if width * height > max_pixels:
        raise ValueError(
            f"too large: it is {width}x{height}, {width * height} pixels; at most {max_pixels} are allowed"
        )
    if found.is_animated or _orientation(found.exif) > 1:
        return _made_anew(whole, media_type, max_pixels)
    return InputImage(whole, media_type, width, height)


def _made_anew(data: bytes, media_type: MediaType, max_pixels: int) -> InputImage:
    """Upright, and one frame."""
    picture = decoded(data, max_pixels)
    out = io.BytesIO()
    if media_type == "image/jpeg" and picture.width * picture.height > LOSSLESS_PIXELS:
        picture.save(out, "JPEG", quality=_JPEG_QUALITY, subsampling=0, icc_profile=picture.info.get("icc_profile"))
        return InputImage(out.getvalue(), "image/jpeg", picture.width, picture.height)
    picture.save(out, "PNG", compress_level=1, icc_profile=picture.info.get("icc_profile"), exif=b"")
    return InputImage(out.getvalue(), "image/png", picture.width, picture.height)


def _walk_png(data: bytes) -> _Found:
    """Every chunk, with its checksum. Raises ValueError."""
    found = _Found()
    view = memoryview(data)
    at = len(png.SIGNATURE)
    for _ in range(png.CHUNKS_LIMIT):
        if at + 12 > len(data):
            raise ValueError("cut short: the PNG ends before its last chunk")
        length = _U32.unpack_from(data, at)[0]
        kind, stop = data[at + 4 : at + 8], at + 12 + length
        if stop > len(data):
            raise ValueError("cut short: the PNG ends inside a chunk")
        if zlib.crc32(view[at + 4 : stop - 4]) != _U32.unpack_from(data, stop - 4)[0]:
            raise ValueError(f"damaged: the checksum of the PNG's chunk at byte {at} is wrong")
        if kind == b"IEND":
            found.end = stop
            return found
        if kind == b"acTL":
            found.is_animated = True
        elif kind == b"eXIf":
            found.exif = data[at + 8 : stop - 4]
        at = stop
    raise ValueError(f"not a picture: a PNG of more than {png.CHUNKS_LIMIT} chunks")


def _walk_jpeg(data: bytes) -> _Found:
    """Every segment, and through the scans to the end of the image. Raises ValueError."""
    found = _Found()
    for marker, start, stop in _segments(data):
        if marker == _END:
            found.end = stop
        elif marker == _APP1 and not found.exif and data.startswith(_EXIF, start):
            found.exif = data[start + len(_EXIF) : stop]
    return found


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Each segment's marker, and where its content begins and ends; the last is the end of the image. Raises ValueError."""
    at, scans, fill_bytes = 2, 0, 0
    for _ in range(SEGMENTS_LIMIT):
        if at + 1 >= len(data):
            break
        fill = _FILL.match(data, at)
        if fill is None:
            raise ValueError(f"damaged: the JPEG has no marker at byte {at}")
        fill_bytes += fill.end() - at - 1
        if fill_bytes > MAX_FILL_BYTES:
            raise ValueError(f"not a picture: a JPEG of more than {MAX_FILL_BYTES} fill bytes")
        if fill.end() == len(data):
            break
        marker = data[fill.end()]
        at = fill.end() + 1
        if marker == _END:
            yield marker, at, at
            return
        if marker in _LONE_MARKERS:
            continue
        stop = at + int.from_bytes(data[at : at + 2], "big")
        if stop < at + 2 or stop > len(data):
            break
        yield marker, at + 2, stop
        if marker != _SCAN:
            at = stop
            continue
        scans += 1
        if scans > MAX_SCANS:
            raise ValueError(f"not a picture: a JPEG of more than {MAX_SCANS} scans")
        at = _past_scan(data, stop)
    else:
        raise ValueError(f"not a picture: a JPEG of more than {SEGMENTS_LIMIT} segments")
    raise ValueError("cut short: the JPEG ends before its end marker")


def _past_scan(data: bytes, at: int) -> int:
    """The next marker behind coded pixels, in steps: one search of many megabytes would let nobody else run."""
    while at < len(data):
        marker = _MARKER_IN_SCAN.search(data, at, at + _STEP_BYTES + 1)
        if marker is not None:
            return marker.start()
        at += _STEP_BYTES
    return len(data)


def _walk_webp(data: bytes) -> _Found:
    """Every chunk that RIFF announces. Whether they are whole is another's to say."""
    found = _Found(end=8 + _RIFF_U32.unpack_from(data, 4)[0])
    at = 12
    for _ in range(SEGMENTS_LIMIT):
        if at + 8 > min(found.end, len(data)):
            break
        kind, size = data[at : at + 4], _RIFF_U32.unpack_from(data, at + 4)[0]
        if kind in {b"ANIM", b"ANMF"}:
            found.is_animated = True
        elif kind == b"EXIF":
            content = data[at + 8 : at + 8 + size]
            found.exif = content.removeprefix(_EXIF)  # some writers put JPEG's header before it
        at += 8 + size + (size & 1)
    return found


_WALKS = {"image/png": _walk_png, "image/jpeg": _walk_jpeg, "image/webp": _walk_webp}


def _orientation(exif: bytes) -> int:
    """How EXIF wants the picture turned: 2 to 8; 1 is not at all, also where nothing sensible is said."""
    order = {b"II*\0": "little", b"MM\0*": "big"}.get(exif[:4])
    if order is None:
        return 1

    def number(at: int, count: int) -> int:
        return int.from_bytes(exif[at : at + count], "little" if order == "little" else "big")

    first = number(4, 4)
    for index in range(min(number(first, 2), _ENTRIES_LIMIT)):
        entry = first + 2 + 12 * index
        if entry + 12 > len(exif):
            break
        if number(entry, 2) == _ORIENTATION:
            value = number(entry + 8, 2)
            return value if 2 <= value <= 8 else 1
    return 1
