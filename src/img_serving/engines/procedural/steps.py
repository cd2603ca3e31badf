"""The steps: what they refine, from which every stage of a picture takes its flow, its detail and its grain."""

from __future__ import annotations

import numpy as np

from img_serving.engines.procedural.fields import centres, sample
from img_serving.engines.procedural.noise import tile


class Latent:
    """What the steps refine, 64 x 64 whatever the size of the picture.

    Each step carries every point a little further along a flow (so clouds curl and nebulae fold), lets finer octaves in
    and takes grain away. A picture of few steps is soft and grainy; one of many is folded, detailed and clean.
    """

    SIZE = 64

    def __init__(self, key: str, steps: int) -> None:
        """`key` is the picture's, `steps` how many there will be."""
        potential = tile(f"{key}:flow", self.SIZE, 0.5, gain=0.42, coarsest=4)
        across = np.roll(potential, -1, 0) - np.roll(potential, 1, 0)
        down = np.roll(potential, 1, 1) - np.roll(potential, -1, 1)
        self.velocity = (across, down)  # the curl of a potential: nothing is compressed, only stirred
        cells = centres(self.SIZE)
        self.home = (
            np.broadcast_to(cells, (self.SIZE, self.SIZE)),
            np.broadcast_to(cells[:, None], (self.SIZE, self.SIZE)),
        )
        self.warp = (np.zeros_like(potential), np.zeros_like(potential))
        self.steps, self.stride = steps, 0.64 / (steps + 12.0)
        self.done = 0

    def advance(self) -> None:
        """One step."""
        u, v = self.home[0] + self.warp[0], self.home[1] + self.warp[1]
        for warp, velocity in zip(self.warp, self.velocity, strict=True):
            moved = sample(velocity, u, v)
            moved *= np.float32(self.stride)
            np.add(warp, moved, out=warp)
        self.done += 1

    @property
    def detail(self) -> float:
        """How many octaves are there, 0 to 1."""
        return self.done / (self.done + 5.0)

    @property
    def grain(self) -> float:
        """How much noise is left."""
        return 0.36 / (self.done * (1.0 + self.done / 30.0))
