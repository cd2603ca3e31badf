"""A picture's pixels: decoded with limits, upright, in eight bits a channel; of an animation the first frame."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from img_serving.media.png import without_text
from img_serving.media.transcode import MAX_PIXELS, has_alpha, in_eight_bits, without_alpha

if TYPE_CHECKING:
    from PIL import Image

_FORMATS = ("PNG", "JPEG", "WEBP")
"""Those that are let in elsewhere: Pillow reads many more, some of them by running other programs."""


def decoded(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode a PNG, JPEG or WebP: upright (EXIF), and of mode L, RGB, or RGBA where something in it is transparent.

    Raises:
        ValueError: it is no picture, a broken one, or over `max_pixels`.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(without_text(data)), formats=_FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise ValueError(f"a picture of {width}x{height} is over {max_pixels} pixels and is not decoded")
            opened.load()
            upright = in_eight_bits(ImageOps.exif_transpose(opened))
            if has_alpha(upright):
                return upright.convert("RGBA")
            return upright if upright.mode in {"L", "RGB"} else upright.convert("RGB")
    except ValueError:
        raise
    except Exception as error:
        # a broken picture makes Pillow raise nearly anything
        raise ValueError(f"the picture could not be decoded ({type(error).__name__})") from error


def on_white(data: bytes, size: tuple[int, int], max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture as RGB, on white where it is transparent, stretched to `size` (width and height in pixels).

    Raises:
        ValueError: as `decoded` does.
    """
    from PIL import Image

    rgb = without_alpha(decoded(data, max_pixels))
    return rgb if rgb.size == size else rgb.resize(size, Image.Resampling.LANCZOS)
