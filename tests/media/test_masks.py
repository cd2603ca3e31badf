"""Masks: the same area, said in either way."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from img_serving.media import masks
from img_serving.media.masks import mask_in, transparent_where_painted, white_where_painted, with_transparency


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def with_a_hole() -> bytes:
    """Opaque red, but for a transparent left half and a half-transparent pixel."""
    picture = Image.new("RGBA", (4, 2), (255, 0, 0, 255))
    picture.paste((0, 0, 0, 0), (0, 0, 2, 2))
    picture.putpixel((3, 1), (0, 0, 0, 100))
    return png(picture)


def test_transparent_is_painted_and_becomes_white():
    white = opened(white_where_painted(with_a_hole()))
    assert white.mode == "L"
    assert [white.getpixel((x, 0)) for x in range(4)] == [255, 255, 0, 0]
    assert white.getpixel((3, 1)) == 155


def test_a_black_and_white_mask_is_taken_as_it_is():
    picture = Image.new("RGB", (3, 1), (0, 0, 0))
    picture.putpixel((1, 0), (255, 255, 255))
    white = opened(white_where_painted(png(picture)))
    assert [white.getpixel((x, 0)) for x in range(3)] == [0, 255, 0]
    clear = opened(transparent_where_painted(png(picture)))
    assert [clear.getchannel("A").getpixel((x, 0)) for x in range(3)] == [255, 0, 255]


def test_both_ways_say_the_same_area():
    clear = transparent_where_painted(with_a_hole())
    assert opened(clear).mode == "RGBA"
    assert white_where_painted(clear) == white_where_painted(with_a_hole())


def test_a_palette_with_transparency_has_an_alpha():
    picture = Image.new("P", (2, 1), 0)
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.putpixel((1, 0), 1)
    out = io.BytesIO()
    picture.save(out, "PNG", transparency=0)
    white = opened(white_where_painted(out.getvalue()))
    assert [white.getpixel((x, 0)) for x in range(2)] == [255, 0]


@pytest.mark.parametrize("data", [b"", b"no picture", with_a_hole()[:40]])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(ValueError, match="mask"):
        white_where_painted(data)


def test_a_bomb_is_not_decoded(monkeypatch):
    monkeypatch.setattr(masks, "MAX_PIXELS", 7)
    with pytest.raises(ValueError, match="over 7 pixels"):
        transparent_where_painted(with_a_hole())


def test_an_edit_without_a_mask_may_paint_where_its_picture_is_transparent_or_else_everywhere():
    mask = opened(mask_in(with_a_hole()))
    assert [mask.getchannel("A").getpixel((x, 0)) for x in range(4)] == [0, 0, 255, 255]
    everywhere = opened(mask_in(png(Image.new("RGB", (3, 2), "red"))))
    assert (everywhere.size, everywhere.getextrema()) == ((3, 2), ((0, 0),) * 4)


def test_a_mask_becomes_the_transparency_of_its_picture_and_leaves_the_colours():
    picture = png(Image.new("RGB", (8, 4), "red"))
    merged = opened(with_transparency(picture, with_a_hole()))
    assert merged.size == (8, 4)
    assert (merged.getpixel((0, 0)), merged.getpixel((7, 0))) == ((255, 0, 0, 0), (255, 0, 0, 255))
    same = opened(with_transparency(with_a_hole(), with_a_hole()))
    assert [same.getchannel("A").getpixel((x, 0)) for x in range(4)] == [0, 0, 255, 255]


@pytest.mark.parametrize("data", [b"", b"no picture", with_a_hole()[:40]])
def test_a_picture_that_is_none_gets_no_mask(data):
    with pytest.raises(ValueError, match="mask"):
        mask_in(data)
    with pytest.raises(ValueError, match="mask"):
        with_transparency(data, with_a_hole())
