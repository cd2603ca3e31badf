"""Re-encoding a picture as another format, with Pillow, in a thread of the caller's choosing."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from img_serving.domain.images import OutputFormat
from img_serving.media.png import without_text

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 32 * 1024 * 1024
"""A picture of more pixels is not decoded: a small file can claim a size that fills the memory."""


def transcode(data: bytes, to: OutputFormat, compression: int | None = None) -> bytes:
    """Decode `data` (any format Pillow reads) and encode it as `to`.

    `compression` is OpenAI's `output_compression`: the quality from 0 to 100 of JPEG and WebP (100 where None). JPEG has no
    transparency: it is laid on white.

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    from PIL import Image, ImageOps

    quality = 100 if compression is None else compression
    try:
        with Image.open(io.BytesIO(without_text(data))) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"a picture of {width}x{height} is over {MAX_PIXELS} pixels and is not decoded")
            picture.load()
            upright = in_eight_bits(ImageOps.exif_transpose(picture))
            out = io.BytesIO()
            if to == "jpeg":
                without_alpha(upright).save(out, "JPEG", quality=max(1, quality))
            elif to == "webp":
                mode = "RGBA" if has_alpha(upright) else "RGB"
                upright.convert(mode).save(out, "WEBP", quality=quality, method=2)
            else:
                upright.save(out, "PNG", compress_level=1)
            return out.getvalue()
    except ValueError:
        raise
    except Exception as error:
        # a broken picture makes Pillow raise nearly anything
        raise ValueError(f"the picture could not be decoded ({type(error).__name__})") from error


def in_eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit greys scaled (a plain conversion clips them to white), CMYK and the like as RGB."""
    if picture.mode.startswith("I"):
        return picture.convert("I").point(lambda value: value / 257).convert("L")
    return picture.convert("RGB") if picture.mode in {"CMYK", "YCbCr", "LAB", "HSV", "F"} else picture


def has_alpha(picture: Image.Image) -> bool:
    """Whether something in it may be transparent."""
    return picture.mode in {"RGBA", "LA", "PA"} or "transparency" in picture.info


def without_alpha(picture: Image.Image) -> Image.Image:
    """As RGB, laid on white where it is transparent."""
    if not has_alpha(picture):
        return picture.convert("RGB")
    layered = picture.convert("RGBA")
    ground = layered.convert("RGB")
    ground.paste((255, 255, 255), (0, 0, *layered.size))
    ground.paste(layered, mask=layered.getchannel("A"))
    return ground
