"""Metadata of all three formats goes, and no pixel with it."""

from __future__ import annotations

import io
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from img_serving.domain.images import MediaType
from img_serving.media.sniff import check_picture
from img_serving.media.strip import strip_metadata

steady = settings(deadline=None, derandomize=True)
SECRET = b"the prompt of a secret lighthouse"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def drawn(size: tuple[int, int] = (40, 30), mode: str = "RGB") -> Image.Image:
    picture = Image.new(mode, size)
    for y in range(size[1]):
        for x in range(size[0]):
            picture.putpixel((x, y), (x * 7 % 256, y * 11 % 256, (x ^ y) % 256, 255 - x)[: len(mode)])
    return picture


def exif() -> bytes:
    made = Image.Exif()
    made[0x010E] = SECRET.decode()  # ImageDescription
    return made.tobytes()


def saved(form: str, picture: Image.Image | None = None, **options) -> bytes:
    out = io.BytesIO()
    (picture or drawn()).save(out, form, **options)
    return out.getvalue()


def text() -> PngImagePlugin.PngInfo:
    made = PngImagePlugin.PngInfo()
    made.add_text("parameters", SECRET.decode())
    made.add_itxt("workflow", SECRET.decode(), zip=False)
    return made


WITH: list[tuple[MediaType, bytes]] = [
    ("image/png", saved("PNG", pnginfo=text(), exif=exif())),
    ("image/jpeg", saved("JPEG", exif=exif(), comment=SECRET, xmp=SECRET)),
    ("image/jpeg", saved("JPEG", exif=exif(), progressive=True, icc_profile=PROFILE)),
    ("image/jpeg", saved("JPEG", exif=exif()) + SECRET),
    ("image/webp", saved("WEBP", exif=exif(), xmp=SECRET)),
    ("image/webp", saved("WEBP", exif=exif(), lossless=True, icc_profile=PROFILE)),
    ("image/webp", saved("WEBP", drawn((31, 17), "RGBA"), exif=exif())),
    ("image/webp", saved("WEBP", exif=exif()) + SECRET),
]
WITHOUT: list[tuple[MediaType, bytes]] = [
    ("image/png", saved("PNG")),
    ("image/jpeg", saved("JPEG")),
    ("image/jpeg", saved("JPEG", icc_profile=PROFILE, progressive=True)),
    ("image/webp", saved("WEBP")),
    ("image/webp", saved("WEBP", lossless=True)),
    ("image/webp", saved("WEBP", drawn(mode="RGBA"), icc_profile=PROFILE)),
]


@pytest.mark.parametrize(("media_type", "data"), WITH)
def test_what_was_written_into_the_file_is_gone_and_the_picture_is_not(media_type, data):
    assert SECRET in data
    clean = strip_metadata(data, media_type)
    assert SECRET not in clean
    assert check_picture(clean)[0] == media_type
    before, after = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(clean))
    assert after.tobytes() == before.tobytes()
    assert after.info.get("icc_profile") == before.info.get("icc_profile")
    assert not after.getexif()
    assert strip_metadata(clean, media_type) is clean


@pytest.mark.parametrize(("media_type", "data"), WITHOUT)
def test_what_needs_no_change_is_not_copied(media_type, data):
    assert strip_metadata(data, media_type) is data


@pytest.mark.parametrize(("media_type", "data"), WITH[1:])
def test_a_file_that_is_cut_anywhere_is_refused_or_stripped_and_never_worse(media_type, data):
    for length in range(0, len(data), 7):
        try:
            clean = strip_metadata(data[:length], media_type)
        except ValueError:
            continue
        assert SECRET not in clean


@given(st.binary(max_size=200), st.sampled_from([b"\xff\xd8", b"RIFF\x40\0\0\0WEBP", b""]))
@steady
def test_rubbish_is_refused_with_one_kind_of_error(rubbish, head):
    for media_type in ("image/jpeg", "image/webp"):
        with suppress(ValueError):
            strip_metadata(head + rubbish, media_type)
