"""The start: the pictures that an edit or a variation begins with, at the drawing's size, and where it may be painted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from img_serving.domain.images import InputImage
from img_serving.engines.procedural.canvas import Pause
from img_serving.engines.procedural.fields import Array
from img_serving.media.masks import area_of
from img_serving.media.pixels import decoded, on_white

if TYPE_CHECKING:
    from PIL import Image

MAX_INPUT_PIXELS = 32 * 1024 * 1024
"""Of one picture: what claims more is not decoded."""

_COLUMNS = 5
"""Further pictures that stand side by side at most."""

_FEATHER = 0.16
"""Of a further picture's shorter side fades into what lies below it."""


@dataclass(frozen=True, slots=True, eq=False)
class Start:
    """What is begun with; nothing in it changes.

    Attributes:
        ground: the first picture, uint8 [height, width, 3].
        area: where may be painted, uint8 [height, width]: 255 is wholly, 0 not at all; None: everywhere.
        further: the other pictures in their places, uint8 [height, width, 3]; None where there are none.
        cover: how much of `further` is seen, uint8 [height, width].
    """

    ground: Array
    area: Array | None = None
    further: Array | None = None
    cover: Array | None = None

    def shrunk(self, width: int, height: int) -> Start:
        """The same at another size, for a preview."""
        return Start(*(None if one is None else resized(one, width, height) for one in self._layers()))  # type: ignore[arg-type]

    def _layers(self) -> tuple[Array | None, ...]:
        return self.ground, self.area, self.further, self.cover


def start_of(
    images: Sequence[InputImage], mask: InputImage | None, width: int, height: int, pause: Pause = lambda: None
) -> Start:
    """Decode: the first picture is stretched to `width` x `height`, the others are laid over it in rows.

    Without a mask, a first picture that is transparent somewhere is its own: it is painted there (OpenAI's rule). `pause` is
    called before each further picture: what it raises ends it.

    Raises:
        ValueError: there is no picture, or one that cannot be decoded or claims too many pixels.
    """
    if not images:
        raise ValueError("an edit needs a picture to start from")
    size = (width, height)
    ground = np.asarray(on_white(images[0].data, size, MAX_INPUT_PIXELS))
    area = _area(images[0] if mask is None else mask, size, own=mask is None)
    if len(images) == 1:
        return Start(ground, area)
    return Start(ground, area, *_laid_out(images[1:], area, size, pause))


def resized(pixels: Array, width: int, height: int, *, coarsely: bool = False) -> Array:
    """Pixels at another size; `coarsely`: as the mean of what each new pixel covers."""
    from PIL import Image

    how = Image.Resampling.BOX if coarsely else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(pixels).resize((width, height), how))


def _area(picture: InputImage, size: tuple[int, int], *, own: bool) -> Array | None:
    from PIL import Image

    if own:
        opened = decoded(picture.data, MAX_INPUT_PIXELS)
        if opened.mode != "RGBA":
            return None
        area = opened.getchannel("A").point([255 - value for value in range(256)])
        if area.getbbox() is None:
            return None
    else:
        area = area_of(picture.data)
    # a mask is not smoothed: what it keeps is kept to the last pixel
    return np.asarray(area if area.size == size else area.resize(size, Image.Resampling.NEAREST))


def _laid_out(
    images: Sequence[InputImage], area: Array | None, size: tuple[int, int], pause: Pause
) -> tuple[Array, Array]:
    """Further pictures in rows at the bottom of what may be painted, soft at their edges: colours, and how much is seen."""
    from PIL import Image

    left, top, right, bottom = _bounds(area, size)
    wide, high = max(1, right - left), max(1, bottom - top)
    columns = min(len(images), _COLUMNS)
    rows = -(-len(images) // columns)
    cell = (wide / columns, min(high * 0.62 / rows, wide / columns))
    further, cover = Image.new("RGB", size), Image.new("L", size)
    for number, image in enumerate(images):
        pause()
        row, column = divmod(number, columns)
        in_row = min(columns, len(images) - row * columns)
        picture = decoded(image.data, MAX_INPUT_PIXELS).convert("RGBA")
        share = min(cell[0] * 0.9 / picture.width, cell[1] * 0.9 / picture.height)
        picture = picture.resize(
            (max(1, round(picture.width * share)), max(1, round(picture.height * share))), Image.Resampling.LANCZOS
        )
        middle_x = left + wide / 2 + (column - (in_row - 1) / 2) * cell[0]
        middle_y = bottom - cell[1] * (rows - row - 0.5)
        place = (round(middle_x - picture.width / 2), round(middle_y - picture.height / 2))
        further.paste(picture.convert("RGB"), place)
        cover.paste(_softened(picture), place)
    return np.asarray(further), np.asarray(cover)


def _bounds(area: Array | None, size: tuple[int, int]) -> tuple[int, int, int, int]:
    if area is None or not area.any():
        return 0, 0, *size
    columns, rows = np.flatnonzero(area.any(axis=0)), np.flatnonzero(area.any(axis=1))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _softened(picture: Image.Image) -> Image.Image:
    """How much of a picture is seen: what is opaque in it, fading towards its edges."""
    from PIL import Image

    reach = np.float32(max(1.0, min(picture.size) * _FEATHER))
    x, y = (np.minimum(np.arange(side), np.arange(side)[::-1]).astype(np.float32) for side in picture.size)
    edge = np.clip((np.minimum(x[None, :], y[:, None]) + np.float32(1.0)) / reach, 0.0, 1.0)
    alpha = np.asarray(picture.getchannel("A"), np.float32) * edge * edge * (3.0 - 2.0 * edge)
    return Image.fromarray(alpha.astype(np.uint8))
