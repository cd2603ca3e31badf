"""The two ways to say where an edit may paint: transparent there (OpenAI's, ComfyUI's), or white there (A1111's)."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from img_serving.media.png import SIGNATURE, without_text
from img_serving.media.transcode import MAX_PIXELS, has_alpha

if TYPE_CHECKING:
    from PIL import Image

_COLOUR_TYPE = 25
"""Where a PNG says what its pixels are (PNG 11.2.1)."""

_WITH_ALPHA = (b"\x04", b"\x06")


def white_where_painted(mask: bytes, *, needs_area: bool = False) -> bytes:
    """An 8-bit grey PNG of the same size, white where the edit may paint and black where it may not.

    Of a picture with an alpha channel that is where it is transparent (OpenAI's rule: alpha 0 is edited). One without has to
    be black and white already, white being what other clients paint with: it is taken as it is.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`; with `needs_area` also one that leaves nothing to paint.
    """
    area = area_of(mask)
    if needs_area and area.getbbox() is None:
        raise ValueError("the mask leaves nothing to paint: it is opaque, or black, everywhere")
    return _png(area)


def transparent_where_painted(mask: bytes) -> bytes:
    """An RGBA PNG of the same size, transparent where the edit may paint: by the same rule, for those who want it so.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    from PIL import Image, ImageChops

    area = area_of(mask)
    keep = ImageChops.invert(area)
    return _png(Image.merge("RGBA", (keep, keep, keep, keep)))


def with_alpha(mask: bytes) -> bytes:
    """The mask as a PNG that is transparent where the edit may paint: itself, where it has an alpha channel already.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    has_channel = mask.startswith(SIGNATURE) and mask[_COLOUR_TYPE : _COLOUR_TYPE + 1] in _WITH_ALPHA
    return mask if has_channel else transparent_where_painted(mask)


def mask_in(picture: bytes) -> bytes:
    """The mask of an edit that was given none, by OpenAI's rule: transparent where the picture is, else everywhere.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    from PIL import Image

    opened = _opened(picture)
    if not has_alpha(opened):
        return _png(Image.new("RGBA", opened.size, (0, 0, 0, 0)))
    return transparent_where_painted(picture)


def with_transparency(picture: bytes, mask: bytes) -> bytes:
    """An RGBA PNG of the picture, transparent where the mask lets the edit paint; a mask of another size is stretched.

    Raises:
        ValueError: one of the two is not a picture, or over `MAX_PIXELS`.
    """
    from PIL import ImageChops

    merged = _opened(picture).convert("RGB").convert("RGBA")
    keep = ImageChops.invert(area_of(mask))
    merged.putalpha(keep if keep.size == merged.size else keep.resize(merged.size))
    return _png(merged)


def area_of(mask: bytes) -> Image.Image:
    """Where to paint, as an 8-bit grey picture: 255 is "wholly". The same rule, for those who work on pixels.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    from PIL import ImageChops

    picture = _opened(mask)
    if has_alpha(picture):
        return ImageChops.invert(picture.convert("RGBA").getchannel("A"))
    return picture.convert("L")


def _opened(data: bytes) -> Image.Image:
    """The picture, decoded. Raises ValueError."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(without_text(data))) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"a mask of {width}x{height} is over {MAX_PIXELS} pixels and is not decoded")
            picture.load()
            return picture
    except ValueError:
        raise
    except Exception as error:
        # a broken picture makes Pillow raise nearly anything
        raise ValueError(f"the mask could not be decoded ({type(error).__name__})") from error


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG", compress_level=1)
    return out.getvalue()
