"""What an engine may return for a picture, made into the bytes of a file."""

from __future__ import annotations

from typing import Any

from img_serving.domain.images import Artifact, ItemFailure
from img_serving.media.payload import artifact_from_bytes
from img_serving.media.png import encode_png


def artifact_of(picture: Any, seed: int) -> Artifact | ItemFailure:
    """An engine's picture (`engine.Picture`) as an artifact; a failure stays one.

    Raises:
        ValueError: it is none, and why.
    """
    if isinstance(picture, ItemFailure):
        return picture
    return artifact_from_bytes(file_of(picture), seed)


def file_of(picture: Any) -> bytes:
    """The bytes of a PNG, or what they were if they are a file's already.

    Raises:
        ValueError: neither bytes, nor a uint8 array [height, width, 3], nor a Pillow image.
    """
    if isinstance(picture, (bytes, bytearray, memoryview)):
        return bytes(picture)
    import numpy as np  # noqa: PLC0415 - only engines that draw need it

    if hasattr(picture, "convert"):  # a Pillow image, without importing Pillow to ask
        picture = np.asarray(picture.convert("RGB"))
    if not isinstance(picture, np.ndarray):
        raise ValueError(  # noqa: TRY004 - callers tell one thing from all others: that it is no picture
            f"a picture is the bytes of a file, a uint8 array [height, width, 3] or a Pillow image, not {type(picture)}"
        )
    return encode_png(picture)
