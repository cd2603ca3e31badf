"""What a file is and whether it is complete: judged without decoding, robust against anything."""

from __future__ import annotations

import io
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from img_serving.media.sniff import check_picture, dimensions, sniff

WIDTH, HEIGHT = 37, 21


def encoded(kind: str, **options) -> bytes:
    picture = Image.effect_noise((WIDTH, HEIGHT), 60).convert("RGB")
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


PICTURES = {
    "png": ("image/png", encoded("PNG")),
    "jpeg": ("image/jpeg", encoded("JPEG")),
    "progressive jpeg": ("image/jpeg", encoded("JPEG", progressive=True)),
    "jpeg with exif": ("image/jpeg", encoded("JPEG", exif=b"Exif\0\0" + b"\xff\xd8\xff\xd9" * 9, comment=b"\xff\xc0")),
    "webp (VP8)": ("image/webp", encoded("WEBP")),
    "webp (VP8L)": ("image/webp", encoded("WEBP", lossless=True)),
    "webp (VP8X)": ("image/webp", encoded("WEBP", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")),
}
EVERY = pytest.mark.parametrize(("media_type", "data"), PICTURES.values(), ids=PICTURES.keys())


@EVERY
def test_a_picture_is_known_with_its_size(media_type, data):
    assert sniff(data) == media_type
    assert dimensions(memoryview(data)) == (WIDTH, HEIGHT)
    assert check_picture(bytearray(data)) == (media_type, WIDTH, HEIGHT)


@EVERY
def test_a_picture_cut_anywhere_is_never_complete(media_type, data):
    for stop in range(len(data)):
        with pytest.raises(ValueError, match=r"^(cut short|not a picture)"):
            check_picture(data[:stop])


@EVERY
def test_padding_behind_a_picture_is_harmless(media_type, data):
    assert check_picture(data + b"\0" * 513) == (media_type, WIDTH, HEIGHT)


@EVERY
def test_headers_are_enough_for_the_size(media_type, data):
    assert dimensions(data[: len(data) * 9 // 10]) == (WIDTH, HEIGHT)


@pytest.mark.parametrize(
    "data",
    [b"", b"\x89PNG", b"GIF89a\1\0\1\0", b"\0\0\0 ftypavif", b"<html>", b"RIFF\0\0\0\0WAVEfmt ", b"RIFF", b"\xff\xd8"],
)
def test_what_is_no_picture_of_ours_is_none(data):
    assert sniff(data) is None
    with pytest.raises(ValueError, match="not a picture"):
        check_picture(data)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xd9",
        b"\xff\xd8\xff\xc0\0\x08\x08\0\0\0\x10\x01\x00\0\0",
        b"\xff\xd8\xff\xda\0\x02",
        b"\xff\xd8\xffX",
        b"\xff\xd8\xff\xe0\0\0",
        b"\xff\xd8\xff\xe0\0\x02junk",
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + b"\0\x01\0\0" * 2 + b"\x08\2\0\0\0",
        b"RIFF\x20\0\0\0WEBPVP8 \x0a\0\0\0\0\0\0abc\1\0\1\0",
        b"RIFF\x20\0\0\0WEBPVP8L\x0a\0\0\0\0abcdefgh",
        b"RIFF\x20\0\0\0WEBPALPH\x0a\0\0\0\0abcdefgh",
        b"RIFF\x12\0\0\0WEBPVP8X\x0a\0\0\0\0\0\0\0\xff\xff\xff\0\0\0",
    ],
)
def test_impossible_headers_are_refused(data):
    with pytest.raises(ValueError, match=r"^(cut short|not a picture)"):
        check_picture(data)


HEADS = st.sampled_from(
    [b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", b"\xff\xd8\xff", b"\xff\xd8\xff\xe0\0\4ab", b"RIFF\xff\0\0\0WEBP"]
)


@settings(deadline=None)
@given(st.builds(bytes.__add__, HEADS, st.binary(max_size=200)) | st.binary(max_size=64))
def test_random_bytes_raise_nothing_but_value_errors(data):
    for judge in (dimensions, check_picture):
        with suppress(ValueError):
            judge(data)
    sniff(data)


@settings(deadline=None)
@given(st.sampled_from(list(PICTURES.values())), st.data())
def test_damaged_pictures_raise_nothing_but_value_errors(picture, data):
    damaged = bytearray(picture[1])
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    with suppress(ValueError):
        check_picture(damaged)
