"""Pictures out of tensors and into them: files in BYTES, or pixels of any usual layout. Slow for pixels: for threads."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from img_serving.backends.kserve.options import Layout, ModelOptions
from img_serving.backends.kserve.tensors import Tensor, check_length, elements
from img_serving.domain.images import Artifact, ItemFailure
from img_serving.domain.vocabulary import shown
from img_serving.media.payload import artifact_from_base64, artifact_from_bytes
from img_serving.media.png import encode_png, without_text
from img_serving.media.sniff import SIDE_LIMIT, sniff
from img_serving.media.transcode import MAX_PIXELS

if TYPE_CHECKING:
    import numpy.typing as npt

_FLOATS: Final = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}
_DARK, _BRIGHT = -0.5, 2.0
"""Past these, floating-point values are no picture from 0 to 1 with a little noise at its ends."""


def pictures_in(tensor: Tensor, seeds: Sequence[int | None], options: ModelOptions) -> list[Artifact | ItemFailure]:
    """The pictures of a reply, one for each of `seeds`. A file that is no good fails alone.

    Raises:
        ValueError: the tensor is none of pictures, or of another number of them; the message says why.
    """
    if tensor.datatype != "BYTES":
        rows = pixels_of(tensor, len(seeds), options)
        return [artifact_from_bytes(encode_png(one), seed) for one, seed in zip(rows, seeds, strict=True)]
    files = elements(tensor)
    if len(files) < len(seeds) or (len(seeds) > 1 and len(files) != len(seeds)):
        raise ValueError(f"{len(files)} pictures for {len(seeds)}")
    return [_artifact(data, seed) for data, seed in zip(files, seeds, strict=False)]


def pixels_of(tensor: Tensor, count: int, options: ModelOptions) -> list[npt.NDArray[Any]]:
    """The first `count` pictures of a tensor of pixels, each uint8 [height, width, 3].

    Raises:
        ValueError: it is none, of impossible sides or too many pixels, or holds what is no colour.
    """
    import numpy as np  # noqa: PLC0415 - only where pixels come

    check_length(tensor)
    shape, name = tensor.shape, shown(tensor.name)
    layout = options.layout or _layout(shape)
    if layout is None:
        raise ValueError(f"the tensor {name} {list(shape)} is neither [height, width, 3] nor [3, height, width]")
    if len(shape) < 3:
        raise ValueError(f"the tensor {name} {list(shape)} has no room for height, width and colours")
    height, width, colours = shape[-3:] if layout == "hwc" else (shape[-2], shape[-1], shape[-3])
    if colours not in {1, 3}:
        raise ValueError(f"the tensor {name} {list(shape)} has {colours} colours a pixel where 3 or 1 are known")
    if not (0 < height <= SIDE_LIMIT and 0 < width <= SIDE_LIMIT and height * width <= MAX_PIXELS):
        raise ValueError(
            f"the tensor {name} is a picture of {width}x{height}, and at most {MAX_PIXELS} pixels are drawn"
        )
    came = math.prod(shape[:-3])
    if came < count or (count > 1 and came != count):
        raise ValueError(f"{came} pictures for {count}")
    rows = _numbers(tensor, np).reshape(came, *shape[-3:])[:count]
    if layout == "chw":
        rows = rows.transpose(0, 2, 3, 1)
    pictures = [one if one.dtype == np.uint8 else _in_eight_bits(one, name, options, np) for one in rows]
    return [np.ascontiguousarray(one if colours == 3 else np.repeat(one, 3, axis=2)) for one in pictures]


def pixels_from(data: bytes, width: int, height: int, *, is_mask: bool = False) -> npt.NDArray[Any]:
    """A picture file as uint8 [height, width, 3] of this size, or a mask as [height, width, 1].

    Raises:
        ValueError: it is not a picture, or over `MAX_PIXELS`.
    """
    import numpy as np  # noqa: PLC0415 - only models that want pixels need it
    from PIL import Image, ImageOps  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(without_text(data))) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"a picture of {opened.width}x{opened.height} is over {MAX_PIXELS} pixels")
            picture = ImageOps.exif_transpose(opened).convert("L" if is_mask else "RGB")
    except ValueError:
        raise
    except Exception as error:
        # a broken picture makes Pillow raise nearly anything
        raise ValueError(f"the picture could not be decoded ({type(error).__name__})") from error
    if picture.size != (width, height):
        how = Image.Resampling.NEAREST if is_mask else Image.Resampling.LANCZOS
        picture = picture.resize((width, height), how)
    return np.asarray(picture).reshape(height, width, 1 if is_mask else 3)


def raw_pixels(
    pictures: Sequence[npt.NDArray[Any]], datatype: str, layout: Layout, options: ModelOptions, *, is_mask: bool = False
) -> bytes:
    """Pictures of one size as the contents of a tensor: `UINT8` from 0 to 255, floating point in the model's range.

    A mask is from 0 to 1 in every range. Raises ValueError for a datatype that holds no pixels.
    """
    import numpy as np  # noqa: PLC0415 - only models that want pixels need it

    stacked = np.stack(pictures)
    if layout == "chw":
        stacked = stacked.transpose(0, 3, 1, 2)
    if datatype == "UINT8":
        return bytes(stacked.tobytes())
    scaled = stacked.astype(np.float32)
    if is_mask or options.value_range in {None, "0..1"}:
        scaled /= 255.0
    elif options.value_range == "-1..1":
        scaled = scaled / 127.5 - 1.0
    if datatype in _FLOATS:
        return bytes(scaled.astype(_FLOATS[datatype]).tobytes())
    if datatype == "BF16":
        return bytes(((scaled.view("<u4") + 0x8000) >> 16).astype("<u2").tobytes())
    raise ValueError(f"pixels do not travel as {shown(datatype)}")


def _artifact(data: bytes, seed: int | None) -> Artifact | ItemFailure:
    try:
        if data and sniff(data) is None:
            try:
                return artifact_from_base64(data, seed)
            except ValueError:
                pass  # what it is not as a file says more
        return artifact_from_bytes(data, seed)
    except ValueError as error:
        return ItemFailure(f"the backend's reply is no use: {error}")


def _layout(shape: tuple[int, ...]) -> Layout | None:
    if shape[-1:] in {(3,), (1,)}:
        return "hwc"
    return "chw" if shape[-3:-2] in {(3,), (1,)} else None


def _numbers(tensor: Tensor, np: Any) -> npt.NDArray[Any]:
    if tensor.datatype == "UINT8":
        return np.frombuffer(tensor.data, np.uint8)  # type: ignore[no-any-return] # numpy came in as an argument
    if tensor.datatype == "BF16":
        # the upper half of a 32-bit number
        return (np.frombuffer(tensor.data, "<u2").astype("<u4") << 16).view("<f4")  # type: ignore[no-any-return]
    if tensor.datatype not in _FLOATS:
        raise ValueError(f"the tensor {shown(tensor.name)} is of {shown(tensor.datatype)}, which holds no pixels")
    return np.frombuffer(tensor.data, _FLOATS[tensor.datatype])  # type: ignore[no-any-return]


def _in_eight_bits(values: npt.NDArray[Any], name: str, options: ModelOptions, np: Any) -> npt.NDArray[Any]:
    low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"the tensor {name} has values that are no numbers: the model failed")
    scale = options.value_range
    if scale is None and (low < _DARK or high > _BRIGHT):
        right = "0..255" if high > _BRIGHT else "-1..1"
        raise ValueError(
            f'the tensor {name} has values from {low:.3g} to {high:.3g} where 0 to 1 is usual: set value_range = "{right}"'
        )
    scaled = values.astype(np.float32)
    if scale == "-1..1":
        scaled = (scaled + 1.0) * 127.5
    elif scale != "0..255":
        scaled = scaled * 255.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)  # type: ignore[no-any-return]
