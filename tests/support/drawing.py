"""Calls for engines that draw with diffusers, and what to ask of their pictures."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from img_serving.domain.images import Call, ImageRequest, InputImage, Item, ItemFailure
from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions
from img_serving.engines.engine import OnStep, load_fully

SIDE = 64
STEPS = 4


def engine_of(model: Any, **options: Any) -> DiffusersEngine:
    """Loaded; never with network."""
    engine = DiffusersEngine(DiffusersOptions(model=str(model), **{"offline": True, "device": "cpu", **options}))
    load_fully(engine)
    return engine


def pipe_of(engine: DiffusersEngine) -> Any:
    """The pipeline that draws from words."""
    assert engine._words is not None
    return engine._words.pipe


def call(*items: Item, previews: bool = False, width: int = SIDE, height: int = SIDE, **request: Any) -> Call:
    """A batch of these items; an edit if the first one has a picture."""
    operation = "edit" if items and items[0].images else "generation"
    shared = {"prompt": items[0].prompt if items else "", "operation": operation, "steps": STEPS, **request}
    return Call(ImageRequest(**shared), None, width, height, items, timeout_seconds=60.0, previews=previews)


def item(seed: int = 0, prompt: str = "a cat", **more: Any) -> Item:
    return Item(prompt, more.pop("negative", None), seed, **more)


def draw(engine: DiffusersEngine, *items: Item, on_step: OnStep | None = None, **request: Any) -> list[np.ndarray]:
    """Pictures only: a failure is an error."""
    results = engine.generate(call(*items, **request), on_step or OnStep())
    for one in results:
        assert not isinstance(one, ItemFailure), one.message
    return [np.asarray(one) for one in results]


def most_different(first: np.ndarray, second: np.ndarray) -> int:
    """Of 255, in the channel that differs most."""
    return int(np.abs(first.astype(int) - second.astype(int)).max())


def file_of(picture: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    picture.save(out, kind)
    return out.getvalue()


def picture(colour: str = "orange", side: int = SIDE) -> InputImage:
    """A square of one colour with a darker corner."""
    image = Image.new("RGB", (side, side), colour)
    image.paste((20, 30, 60), (0, 0, side // 4, side // 4))
    return InputImage(file_of(image), "image/png", side, side)


def mask_of_right_half(side: int = SIDE) -> InputImage:
    """Transparent, so to be painted, on the right."""
    mask = Image.new("RGBA", (side, side), (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (side // 2, 0, side, side))
    return InputImage(file_of(mask), "image/png", side, side)
