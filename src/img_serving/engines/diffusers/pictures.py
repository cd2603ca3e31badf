"""Pixels in and out: the picture that an edit starts from, where it may paint, and what a pipeline drew."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Final

from img_serving.domain.images import InputImage
from img_serving.media.masks import white_where_painted
from img_serving.media.pixels import on_white

if TYPE_CHECKING:
    import numpy.typing as npt
    from PIL.Image import Image as PILImage

_OVERFLOWED: Final = (
    "the arithmetic left the range of its numbers, so the picture would be black: use dtype bfloat16 or float32"
)


def start_of(picture: InputImage, width: int, height: int) -> PILImage:
    """The picture as RGB, upright, on white where it is transparent, stretched to `width` x `height`.

    Raises:
        ValueError: it is none, or over `MAX_PIXELS`.
    """
    return on_white(picture.data, (width, height))


def painted_of(mask: InputImage, width: int, height: int) -> PILImage:
    """Where may be painted, as pipelines want it: 8-bit grey, white there; stretched to `width` x `height`.

    Raises:
        ValueError: it is not a picture, too large, or leaves nothing to paint.
    """
    from PIL import Image

    with Image.open(io.BytesIO(white_where_painted(mask.data, needs_area=True))) as opened:
        area = opened.convert("L")
    return area if area.size == (width, height) else area.resize((width, height), Image.Resampling.BILINEAR)


def drawn(images: Any) -> list[npt.NDArray[Any]]:
    """A pipeline's pictures, values from 0 to 1, as uint8 of [height, width, 3].

    A tensor [pictures, 3, height, width] is made into bytes where it is: on a GPU that takes no time, and a quarter of its
    numbers' size goes to the CPU. Arrays [height, width, 3] are made into the same bytes here.

    Raises:
        ArithmeticError: there are values in it that are no numbers.
    """
    import numpy as np

    if hasattr(images, "permute"):
        return _drawn_tensor(images)
    pictures = []
    for pixels in images:
        if not np.isfinite(pixels).all():
            raise ArithmeticError(_OVERFLOWED)
        pictures.append(np.ascontiguousarray((np.clip(pixels, 0.0, 1.0) * 255.0).round().astype(np.uint8)))
    return pictures


def _drawn_tensor(images: Any) -> list[npt.NDArray[Any]]:
    import torch

    if not bool(torch.isfinite(images).all()):
        raise ArithmeticError(_OVERFLOWED)
    eight_bits = (images.float().clamp(0.0, 1.0) * 255.0).round().to(torch.uint8)
    return list(eight_bits.permute(0, 2, 3, 1).contiguous().cpu().numpy())


def kept_outside(pixels: npt.NDArray[Any], start: PILImage, painted: PILImage) -> npt.NDArray[Any]:
    """What was drawn where it may be painted, and the start, to the last bit, where not.

    Pipelines send the whole picture through their VAE, which changes it everywhere a little.
    """
    import numpy as np
    from PIL import Image

    return np.asarray(Image.composite(Image.fromarray(pixels), start, painted))
