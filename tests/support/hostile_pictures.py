"""Pictures that are none, that lie, that never end or that hide something: made here, none of them is a file in the tree.

PNG is written by hand (https://www.w3.org/TR/png-3/), for no library writes what it would refuse to read; JPEG (ITU-T T.81) and
WebP (RFC 9649) are taken from Pillow and bent.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from PIL import Image

from img_serving.media.png import SIGNATURE

Verdict = Literal["taken", "refused", "either"]
"""`either`: decoders differ in what they still show of it; that it ends well is all that is asked."""

GIGABYTE = 1 << 30


@dataclass(frozen=True)
class Hostile:
    """One of them, and what has to come of it."""

    name: str
    data: bytes
    verdict: Verdict = "refused"


# PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    """With its right checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def ihdr(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> bytes:
    """The first chunk."""
    return chunk(b"IHDR", struct.pack(">II", width, height) + bytes((depth, colour, 0, 0, interlace)))


def png(header: bytes, pixels: bytes, *between: bytes, behind: bytes = b"") -> bytes:
    """A whole PNG of deflated `pixels`."""
    return b"".join((SIGNATURE, header, *between, chunk(b"IDAT", pixels), chunk(b"IEND", b""), behind))


def rows(width: int, height: int, bits: int = 24, byte: bytes = b"\x7f") -> bytes:
    """Deflated rows without a filter, all of the same byte."""
    return zlib.compress((b"\0" + byte * ((width * bits + 7) // 8)) * height)


@cache
def inflating(size: int) -> bytes:
    """A zlib stream that is a thousandth of the `size` zeros that it inflates to; a multiple of a mebibyte."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    end = b"\x03\0" + struct.pack(">I", (size % 65521) << 16 | 1)
    return b"\x78\xda" + block * (size >> 20) + end


def exif(orientation: int = 6) -> bytes:
    """TIFF's shape, with nothing but an orientation."""
    return b"MM\0*\0\0\0\x08\0\x01" + struct.pack(">HHIHH", 0x0112, 3, 1, orientation, 0) + b"\0\0\0\0"


def _interlaced(side: int) -> bytes:
    """Adam7 in RGB (PNG 8.2)."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    raw = b""
    for left, top, across, down in passes:
        width, height = -(-(side - left) // across), -(-(side - top) // down)
        raw += (b"\0" + b"\x40\x80\xc0" * width) * height
    return png(ihdr(side, side, interlace=1), zlib.compress(raw))


def _frames(count: int, told: int | None = None) -> bytes:
    """An animated PNG of 16 x 16."""
    parts = [SIGNATURE, ihdr(16, 16), chunk(b"acTL", struct.pack(">II", count if told is None else told, 0))]
    number = 0
    pixels = rows(16, 16)
    for index in range(count):
        control = struct.pack(">IIIIIHHBB", number, 16, 16, 0, 0, 1, 10, 0, 0)
        parts.append(chunk(b"fcTL", control))
        number += 1
        if index == 0:
            parts.append(chunk(b"IDAT", pixels))
        else:
            parts.append(chunk(b"fdAT", struct.pack(">I", number) + pixels))
            number += 1
    return b"".join((*parts, chunk(b"IEND", b"")))


def _pngs() -> list[Hostile]:
    small, pixels = ihdr(32, 32), rows(32, 32)
    turned = chunk(b"eXIf", exif())
    bomb = inflating(GIGABYTE)
    palette = chunk(b"PLTE", bytes((200, 100, 50)))
    deep = rows(32, 32, 64)
    good = png(small, pixels)
    return [
        Hostile("png, 60000x60000", png(ihdr(60_000, 60_000), rows(1, 1))),
        Hostile("png, 2147483647 square", png(ihdr(2**31 - 1, 2**31 - 1), rows(1, 1))),
        Hostile("png, 4294967295 square", png(ihdr(2**32 - 1, 2**32 - 1), rows(1, 1))),
        Hostile("png, 0x0", png(ihdr(0, 0), rows(1, 1))),
        Hostile("png, 0x32", png(ihdr(0, 32), pixels)),
        Hostile("png, 1x65535", png(ihdr(1, 65_535), rows(1, 65_535))),
        Hostile("png, 65535x1", png(ihdr(65_535, 1), rows(65_535, 1))),
        Hostile("png, 1x16384", png(ihdr(1, 16_384), rows(1, 16_384)), "either"),
        Hostile("png, one side over the most", png(ihdr(16_385, 1), rows(16_385, 1))),
        Hostile("png, one pixel over the most", png(ihdr(513, 512), rows(513, 512))),
        Hostile("png, as large as it may be", png(ihdr(512, 512), rows(512, 512)), "taken"),
        Hostile("png, pixels of a gigabyte", png(small, bomb), "either"),
        Hostile("png, pixels of a gigabyte, turned", png(small, bomb, turned), "either"),
        Hostile("png, pixels of a gigabyte in 60000x60000", png(ihdr(60_000, 60_000), bomb)),
        Hostile("png, profile of a gigabyte", png(small, pixels, chunk(b"iCCP", b"x\0\0" + bomb), turned), "either"),
        Hostile("png, text of a gigabyte", png(small, pixels, chunk(b"zTXt", b"x\0\0" + bomb), turned), "either"),
        Hostile(
            "png, Unicode text of a gigabyte",
            png(small, pixels, chunk(b"iTXt", b"x\0\1\0\0\0" + bomb), turned),
            "either",
        ),
        Hostile("png, many texts", png(small, pixels, chunk(b"tEXt", b"a\0b") * 50_000, turned), "either"),
        Hostile("png, many texts that inflate", png(small, pixels, *_texts(70), turned), "either"),
        Hostile("png, more chunks than there are", png(small, pixels, chunk(b"tEXt", b"") * 100_001)),
        Hostile("png, garbage for a profile", png(small, pixels, chunk(b"iCCP", b"x\0\0\xff\xfe"), turned), "either"),
        Hostile("png, a profile with no name", png(small, pixels, chunk(b"iCCP", b""), turned), "either"),
        Hostile("png, 3000 frames", _frames(3000), "taken"),
        Hostile("png, a billion frames, as it says", _frames(3, 2**31 - 1), "either"),
        Hostile("png, no frame, as it says", _frames(1, 0), "either"),
        Hostile("png, 16 bit", png(ihdr(32, 32, 16, 6), deep), "taken"),
        Hostile("png, 16 bit grey, turned", png(ihdr(32, 32, 16, 0), rows(32, 32, 16), turned), "taken"),
        Hostile("png, 1 bit", png(ihdr(32, 32, 1, 0), rows(32, 32, 1)), "taken"),
        Hostile("png, 3 bits", png(ihdr(32, 32, 3, 0), rows(32, 32, 3)), "either"),
        Hostile("png, colour type 5", png(ihdr(32, 32, 8, 5), pixels), "either"),
        Hostile("png, interlaced", _interlaced(32), "taken"),
        Hostile("png, interlaced in an unknown way", png(ihdr(32, 32, interlace=9), pixels), "either"),
        Hostile("png, index past its palette", png(ihdr(32, 32, 8, 3), rows(32, 32, 8, b"\xff"), palette), "either"),
        Hostile(
            "png, index past its palette, turned",
            png(ihdr(32, 32, 8, 3), rows(32, 32, 8, b"\xff"), palette, turned),
            "either",
        ),
        Hostile("png, no palette", png(ihdr(32, 32, 8, 3), rows(32, 32, 8)), "either"),
        Hostile("png, one byte of a palette", png(small, pixels, chunk(b"PLTE", b"x"), turned), "either"),
        Hostile("png, transparency of a wrong length", png(small, pixels, chunk(b"tRNS", b"x"), turned), "either"),
        Hostile("png, filter 255", png(small, zlib.compress((b"\xff" + bytes(96)) * 32)), "either"),
        Hostile("png, half of its pixels", png(small, zlib.compress((b"\0" + bytes(96)) * 16)), "either"),
        Hostile("png, half of its pixels, turned", png(small, zlib.compress((b"\0" + bytes(96)) * 16), turned), "either"),
        Hostile("png, pixels that are no zlib", png(small, b"no zlib at all"), "either"),
        Hostile("png, no pixels", SIGNATURE + small + chunk(b"IEND", b"")),
        Hostile("png, two headers", png(small, pixels, ihdr(60_000, 60_000))),
        Hostile("png, header comes late", png(chunk(b"tEXt", b"a\0b") + small, pixels)),
        Hostile("png, end comes first", SIGNATURE + small + chunk(b"IEND", b"") + chunk(b"IDAT", pixels)),
        Hostile("png, wrong checksum", good[:29] + b"\0\0\0\0" + good[33:]),
        Hostile("png, chunk of 4 GB", SIGNATURE + small + b"\xff\xff\xff\xffIDAT" + pixels),
        Hostile("png, signature alone", SIGNATURE),
        Hostile("png, no end", good[:-12]),
        Hostile("png with a zip behind it", png(small, pixels, behind=_zip()), "taken"),
        Hostile("png with a zip inside", png(small, pixels, chunk(b"tEXt", b"zip\0" + _zip())), "taken"),
        Hostile("png with a program in its text", png(small, pixels, chunk(b"tEXt", b"a\0<?php system('id');?>")), "taken"),
        *(
            Hostile(f"png, EXIF says {told}", png(small, pixels, chunk(b"eXIf", exif(told))), "taken")
            for told in (0, 2, 3, 5, 8, 9, 65_535)
        ),
        *(Hostile(f"png, EXIF: {name}", png(small, pixels, chunk(b"eXIf", bad)), "either") for name, bad in _bad_exif()),
    ]  # fmt: skip


def _texts(count: int) -> list[bytes]:
    """Each just below what Pillow lets a single one inflate to."""
    return [chunk(b"zTXt", b"k%d\0\0" % index + inflating(1 << 20)) for index in range(count)]


def _bad_exif() -> list[tuple[str, bytes]]:
    def entry(tag: int, kind: int, count: int, value: int) -> bytes:
        return struct.pack(">HHII", tag, kind, count, value)

    begin = b"MM\0*\0\0\0\x08"
    turned = entry(0x0112, 3, 1, 6 << 16)
    return [
        ("points to itself", begin + b"\0\x02" + turned + entry(0x8769, 4, 1, 8) + b"\0\0\0\x08"),
        ("4 billion values", begin + b"\0\x02" + turned + entry(0x9286, 2, 2**32 - 1, 8) + b"\0\0\0\0"),
        ("values past its end", begin + b"\0\x02" + turned + entry(0x9286, 12, 100, 2**32 - 1) + b"\0\0\0\0"),
        ("65535 entries", begin + b"\xff\xff" + turned * 100),
        ("of unknown kinds", begin + b"\0\x03" + turned + entry(1, 99, 1, 1) + entry(2, 0, 0, 0) + b"\0\0\0\0"),
        ("orientation as words", begin + b"\0\x01" + entry(0x0112, 2, 4, 0x61626300) + b"\0\0\0\0"),
        ("orientation thrice", begin + b"\0\x01" + entry(0x0112, 3, 3, 6 << 16) + b"\0\0\0\0"),
        ("cut short", begin + b"\0\x01\x01"),
        ("garbage", bytes(range(256)) * 4),
        ("nothing", b""),
    ]


# JPEG


def saved(kind: str, picture: Image.Image | None = None, **options: Any) -> bytes:
    """What Pillow writes of a picture that is not all alike."""
    out = io.BytesIO()
    (picture or gradient(48, 32)).save(out, kind, **options)
    return out.getvalue()


def gradient(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Something with all kinds of values."""
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


def _app1(content: bytes) -> bytes:
    return b"\xff\xe1" + struct.pack(">H", len(content) + 8) + b"Exif\0\0" + content


def turned_jpeg(data: bytes, orientation: int = 6) -> bytes:
    """With EXIF that has it turned, so that it is decoded."""
    return data[:2] + _app1(exif(orientation)) + data[2:]


def resized_jpeg(data: bytes, width: int, height: int) -> bytes:
    """The same file, which says that it has another size."""
    at = next(data.index(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in data)
    return data[: at + 5] + struct.pack(">HH", height, width) + data[at + 9 :]


def many_scans(count: int, side: int = 512) -> bytes:
    """A progressive JPEG that goes over all of its pixels `count` times more, for some bytes each time."""
    data = saved("JPEG", Image.new("L", (side, side), 77), progressive=True)
    at = data.rindex(b"\xff\xda")
    last, end = data[at:-2], data[-2:]
    return turned_jpeg(data[:at] + last * (count + 1) + end)


def _jpegs() -> list[Hostile]:
    good = saved("JPEG", quality=90)
    turned = turned_jpeg(good)
    large = saved("JPEG", gradient(512, 512))
    progressive = saved("JPEG", progressive=True)
    profile = b"\xff\xe2" + struct.pack(">H", 16 + 100) + b"ICC_PROFILE\0\1\1" + b"\xfe" * 100
    comment = (
        b"\xff\xfe" + struct.pack(">H", 2 + 60) + b"<html><script>alert(document.domain)</script></html>".ljust(60)
    )
    frame = good[good.index(b"\xff\xc0") :]
    return [
        Hostile("jpeg, says 65500x65500", resized_jpeg(good, 65_500, 65_500)),
        Hostile("jpeg, says 512x512", resized_jpeg(good, 512, 512), "either"),
        Hostile("jpeg, says 512x512, turned", turned_jpeg(resized_jpeg(good, 512, 512)), "either"),
        Hostile("jpeg, says 8x8, turned", turned_jpeg(resized_jpeg(good, 8, 8)), "either"),
        Hostile("jpeg, says 0x0", resized_jpeg(good, 0, 0)),
        Hostile("jpeg, says 1x65535", resized_jpeg(good, 1, 65_535)),
        Hostile("jpeg, as large as it may be, turned", turned_jpeg(large), "taken"),
        Hostile("jpeg, two frames", turned[: turned.index(b"\xff\xc0")] + frame[:19] + frame),
        Hostile("jpeg, a second frame behind its pixels", turned[:-2] + resized_jpeg(frame, 60_000, 60_000), "either"),
        Hostile("jpeg, two pictures", good + good, "taken"),
        Hostile("jpeg, scans without end", many_scans(3000)),
        Hostile("jpeg, as many scans as there may be", many_scans(80), "taken"),
        Hostile("jpeg, more segments than there are", good[:2] + b"\xff\xfe\0\2" * 10_001 + good[2:]),
        Hostile("jpeg, a megabyte of fill bytes", good[:2] + b"\xff" * (1 << 20) + good[2:]),
        Hostile("jpeg, a kilobyte of fill bytes", good[:2] + b"\xff" * 1024 + good[2:], "taken"),
        Hostile("jpeg, four kilobytes of comments", good[:2] + b"\xff\xfe\0\2" * 1000 + good[2:], "taken"),
        Hostile("jpeg, a megabyte of scan without a picture", turned[:-2] + b"\x55" * (1 << 20) + b"\xff\xd9", "either"),
        Hostile("jpeg, CMYK", saved("JPEG", gradient(48, 32, "CMYK")), "taken"),
        Hostile("jpeg, CMYK, turned", turned_jpeg(saved("JPEG", gradient(48, 32, "CMYK"))), "taken"),
        Hostile("jpeg, grey, turned", turned_jpeg(saved("JPEG", gradient(48, 32, "L"))), "taken"),
        Hostile("jpeg, garbage for a profile", turned[:2] + profile + turned[2:], "either"),
        Hostile("jpeg with HTML in its comment", good[:2] + comment + good[2:], "taken"),
        Hostile("jpeg with HTML behind it", good + b"<html><script>alert(1)</script>", "taken"),
        Hostile("jpeg with a zip behind it", good + _zip(), "taken"),
        Hostile("jpeg, progressive, turned", turned_jpeg(progressive), "taken"),
        Hostile("jpeg, start alone", b"\xff\xd8\xff"),
        Hostile("jpeg, start and end", b"\xff\xd8\xff\xd9"),
        Hostile("jpeg, no end", good[:-2]),
        Hostile("jpeg, arithmetic coding, as it says", turned.replace(b"\xff\xc0", b"\xff\xc9"), "either"),
        Hostile("jpeg, lossless, as it says", turned.replace(b"\xff\xc0", b"\xff\xc3"), "either"),
        Hostile("jpeg, Huffman tables of nothing", turned.replace(b"\xff\xc4", b"\xff\xfe"), "either"),
        *(Hostile(f"jpeg, EXIF says {told}", turned_jpeg(good, told), "taken") for told in (0, 3, 5, 8, 9)),
        *(Hostile(f"jpeg, EXIF: {name}", good[:2] + _app1(bad) + good[2:], "either") for name, bad in _bad_exif()),
    ]  # fmt: skip


# WebP


def riff(*chunks: tuple[bytes, bytes]) -> bytes:
    """A WebP of these chunks."""
    body = b"WEBP" + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) & 1) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _canvas(width: int, height: int, flags: int) -> bytes:
    return bytes((flags, 0, 0, 0)) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")


def _lossless(picture: Image.Image) -> bytes:
    """The content of the VP8L chunk of a picture."""
    return saved("WEBP", picture, lossless=True)[20:]


def _animation(count: int, width: int, height: int, *, at: int = 0) -> bytes:
    pixels = _lossless(gradient(16, 16))
    frame = at.to_bytes(3, "little") * 2 + (15).to_bytes(3, "little") * 2 + (10).to_bytes(3, "little") + b"\0"
    frame += b"VP8L" + struct.pack("<I", len(pixels)) + pixels + b"\0" * (len(pixels) & 1)
    return riff((b"VP8X", _canvas(width, height, 2)), (b"ANIM", bytes(6)), *[(b"ANMF", frame)] * count)


def _webps() -> list[Hostile]:
    good, lossless = saved("WEBP"), saved("WEBP", lossless=True)
    pixels = _lossless(gradient(16, 16))
    huge = b"\x2f" + (16_383 | 16_383 << 14).to_bytes(4, "little") + pixels[5:]
    key = saved("WEBP")[20:]
    wide = key[:6] + struct.pack("<HH", 16_383, 16_383) + key[10:]
    turned = (b"EXIF", exif())
    return [
        Hostile("webp, says 16383x16383", riff((b"VP8 ", wide))),
        Hostile("webp, lossless, says 16384x16384", riff((b"VP8L", huge))),
        Hostile("webp, canvas of 16777216 square", riff((b"VP8X", _canvas(2**24, 2**24, 0)), (b"VP8L", pixels))),
        Hostile(
            "webp, canvas of 16x16 over 16384x16384", riff((b"VP8X", _canvas(16, 16, 8)), (b"VP8L", huge), turned), "either"
        ),
        Hostile(
            "webp, canvas of 512x512 over 16x16",
            riff((b"VP8X", _canvas(512, 512, 8)), (b"VP8L", pixels), turned),
            "either",
        ),
        Hostile("webp, 3000 frames", _animation(3000, 16, 16), "taken"),
        Hostile("webp, frames outside of it", _animation(3, 16, 16, at=1000), "either"),
        Hostile("webp, frames on 512x512", _animation(200, 512, 512), "taken"),
        Hostile("webp, an animation without a frame", riff((b"VP8X", _canvas(16, 16, 2)), (b"ANIM", bytes(6)))),
        Hostile("webp, more chunks than there are", riff((b"VP8X", _canvas(16, 16, 0)), *[(b"JUNK", b"")] * 10_001)),
        Hostile(
            "webp, garbage for a profile",
            riff((b"VP8X", _canvas(16, 16, 0x28)), (b"ICCP", b"\xfe" * 100), (b"VP8L", pixels), turned),
            "either",
        ),
        Hostile("webp, says 4 GB", good[:4] + b"\xff\xff\xff\xff" + good[8:]),
        Hostile("webp, says 0 bytes", good[:4] + bytes(4) + good[8:]),
        Hostile("webp, pixels of 4 GB", good[:16] + b"\xff\xff\xff\xff" + good[20:]),
        Hostile("webp, lossy", good, "taken"),
        Hostile("webp, lossless", lossless, "taken"),
        Hostile("webp with a zip behind it", good + _zip(), "taken"),
        Hostile("webp, head alone", good[:12]),
        *(
            Hostile(
                f"webp, EXIF: {name}", riff((b"VP8X", _canvas(16, 16, 8)), (b"VP8L", pixels), (b"EXIF", bad)), "either"
            )
            for name, bad in _bad_exif()
        ),
    ]  # fmt: skip


# what is none of them


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../fuzzmark-from-a-zip", "x")
    return out.getvalue()


_LAUGHS = b'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "ha">' + b"".join(
    b'<!ENTITY %c "%s">' % (letter, b"&%c;" % (letter - 1) * 10) for letter in range(ord("b"), ord("k"))
)


def _others() -> list[Hostile]:
    small = gradient(16, 16)
    gif = saved("GIF", small)
    animated = saved(
        "GIF", gradient(16, 16, "P"), save_all=True, append_images=[small.rotate(one) for one in range(300)]
    )
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><script>alert(1)</script></svg>'
    return [
        Hostile("gif", gif),
        Hostile("gif, 300 frames", animated),
        Hostile("gif, 65535x65535", gif[:6] + b"\xff\xff\xff\xff" + gif[10:]),
        Hostile("gif with a zip behind it", gif + _zip()),
        Hostile("bmp", saved("BMP", small)),
        Hostile("bmp, 2 billion wide", saved("BMP", small)[:18] + b"\xff\xff\xff\x7f" * 2 + saved("BMP", small)[26:]),
        Hostile("tiff", saved("TIFF", small)),
        Hostile("ico", saved("ICO", small)),
        Hostile("ppm, a billion square", b"P6 1000000000 1000000000 255\n" + b"x" * 100),
        Hostile("eps, which some hand to another program", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run"),
        Hostile("pdf", b"%PDF-1.7\n1 0 obj<</Type/Catalog/OpenAction<</S/JavaScript/JS(app.alert(1))>>>>endobj"),
        Hostile("svg", svg),
        Hostile(
            "svg, a file of this machine", b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]><svg>&x;</svg>'
        ),
        Hostile("svg, a billion laughs", _LAUGHS + b"]><svg>&j;</svg>"),
        Hostile("html", b"<!doctype html><script>alert(1)</script>"),
        Hostile("zip", _zip()),
        Hostile("nothing", b""),
        Hostile("one byte", b"\x89"),
        Hostile("one zero", b"\0"),
        Hostile("text", "그림이 아니다".encode()),
        Hostile("a megabyte of zeros", bytes(1 << 20)),
        Hostile("a path", b"/etc/passwd"),
    ]


def _cut() -> list[Hostile]:
    """Each kind, at every eighth."""
    whole = {
        "png": png(ihdr(32, 32), rows(32, 32)),
        "jpeg": turned_jpeg(saved("JPEG")),
        "webp": saved("WEBP"),
        "animated webp": _animation(8, 16, 16),
        "animated png": _frames(8),
    }
    return [
        Hostile(f"{name}, {part} of 8 parts", data[: len(data) * part // 8])
        for name, data in whole.items()
        for part in range(1, 8)
    ]


@cache
def corpus() -> tuple[Hostile, ...]:
    """All of them."""
    return (*_pngs(), *_jpegs(), *_webps(), *_others(), *_cut())
