"""The finish: grain that is left, what is avoided, paper, vignette, contrast and dither; then bytes."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.avoiding import avoid
from img_serving.engines.procedural.chance import key_of
from img_serving.engines.procedural.fields import Array, add, lerp, smooth
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.noise import draws, lattice, profile, tile


class Finish:
    """What turns a band of planes into rows of the image."""

    def __init__(self, frame: Frame) -> None:
        self._frame = frame
        noise = draws(key_of(frame.scene.key, "dither"), 256 * 256).reshape(256, 256)
        self._dither = np.tile(noise, (1, frame.width // 256 + 1))[:, : frame.width]
        self._paper = _paper(frame) if "watercolor" in frame.scene.styles else None
        self._residue = _residue(frame)

    def write(self, planes: Array, image: Array, first: int, last: int) -> None:
        """Finish [3, rows, width] and write rows `first` to `last`; the planes are used up."""
        frame, scene = self._frame, self._frame.scene
        if self._residue is not None:
            at = (frame.y[first:last] + np.float32(8.0)) * np.float32(64)
            for plane, grid in zip(planes, self._residue, strict=True):
                add(plane, lerp(grid, at, 0))
        for name in scene.avoided:
            avoid(planes, name)
        vignette = None
        if self._paper is not None:
            _wash(frame, planes, self._paper, first, last)
        else:
            edge = np.float32(1.0) - (frame.y[first:last] * np.float32(frame.side / frame.height)) ** 2 * np.float32(
                0.42
            )
            column = np.float32(1.0) - (frame.x * np.float32(frame.side / frame.width)) ** 2 * np.float32(0.42)
            vignette = edge[:, None] * column
        contrast = (0.80 + 0.20 * scene.force) * (0.82 + 0.22 * frame.detail)  # the haze lifts with the steps
        dither = self._dither.take(np.arange(first, last) & 255, 0, mode="clip")
        dither += np.float32(255.0 * 0.5 * (1.0 - contrast))
        for channel, plane in enumerate(planes):
            if vignette is not None:
                np.multiply(plane, vignette, out=plane)
            np.multiply(plane, np.float32(255.0 * contrast), out=plane)
            add(plane, dither)
            np.clip(plane, 0.0, 255.0, out=plane)
            np.copyto(image[first:last, :, channel], plane, casting="unsafe")


def _paper(frame: Frame) -> Array:
    """The grain of watercolour paper, [256, width], around 1."""
    grain = tile("paper", 256, 1.0, gain=0.85, coarsest=32)
    columns = (np.arange(frame.width, dtype=np.float32) * np.float32(1024 / frame.side)).astype(np.intp) & 255
    return 1.0 + grain.take(columns, 1) * np.float32(0.035)


def _residue(frame: Frame) -> Array | None:
    """Colour noise that the steps have not taken away yet, [3, 64, width]."""
    strength = frame.latent.grain
    if strength < 0.002:
        return None
    noise = [lattice(key_of(frame.scene.key, "residue", channel), 64) for channel in range(3)]
    wide = (frame.x + np.float32(8.0)) * np.float32(64)
    return np.stack([lerp(grid, wide, 1) * np.float32(strength) for grid in noise])


def _wash(frame: Frame, planes: Array, paper: Array, first: int, last: int) -> None:
    """Pigment on paper: grain, and a ragged white border."""
    grain = paper.take((frame.v[first:last] * np.float32(frame.height / frame.side * 1024)).astype(np.intp) & 255, 0)
    half_x, half_y = frame.width / frame.side / 2, frame.height / frame.side / 2
    ragged = profile(f"{frame.scene.key}:border", frame.x * np.float32(4.0), 0.8) * np.float32(0.02)
    sides = profile(f"{frame.scene.key}:sides", frame.y[first:last] * np.float32(4.0), 0.8) * np.float32(0.02)
    inside = np.minimum(
        (np.float32(half_x) - np.abs(frame.x))[None, :] + sides[:, None],
        (np.float32(half_y) - np.abs(frame.y[first:last]))[:, None] + ragged[None, :],
    )
    inside += (grain - 1.0) * np.float32(0.25)
    ink = smooth(0.035, 0.06, inside)
    pool = np.clip(1.0 - np.abs(inside - np.float32(0.062)) * 45, 0.0, 1.0) * np.float32(0.14)
    pigment = grain - pool
    for plane, white in zip(planes, (0.985, 0.975, 0.955), strict=True):
        np.multiply(plane, pigment, out=plane)
        np.subtract(plane, np.float32(white), out=plane)
        np.multiply(plane, ink, out=plane)
        np.add(plane, np.float32(white), out=plane)
