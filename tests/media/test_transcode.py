"""Re-encoding: what a picture looks like stays, whatever it was made as."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from img_serving.media import transcode as module
from img_serving.media.transcode import transcode


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def decoded(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def test_sixteen_bit_grey_is_scaled_and_not_clipped_to_white() -> None:
    grey = Image.new("I;16", (16, 16), 32768)
    for to in ("jpeg", "webp"):
        shown = decoded(transcode(encoded(grey, "PNG"), to)).convert("L").getpixel((8, 8))
        assert isinstance(shown, (int, float))
        assert abs(shown - 128) <= 2, to


def test_a_cmyk_jpeg_becomes_a_png() -> None:
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert decoded(transcode(data, "png")).mode == "RGB"


def test_transparency_is_kept_in_webp_and_laid_on_white_in_jpeg() -> None:
    data = encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG")
    assert decoded(transcode(data, "webp")).mode == "RGBA"
    corner = decoded(transcode(data, "jpeg")).getpixel((0, 0))
    assert corner == (255, 255, 255)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (32, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decoded(transcode(encoded(image, "JPEG", exif=exif), "png")).size == (16, 32)


def test_a_picture_of_too_many_pixels_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_PIXELS", 100)
    with pytest.raises(ValueError, match="over 100 pixels"):
        transcode(encoded(Image.new("RGB", (16, 16)), "PNG"), "jpeg")


@pytest.mark.parametrize("data", [b"", b"not a picture", encoded(Image.new("RGB", (64, 64)), "PNG")[:60]])
def test_what_cannot_be_decoded_is_a_value_error(data: bytes) -> None:
    with pytest.raises(ValueError, match="could not be decoded"):
        transcode(data, "jpeg")
