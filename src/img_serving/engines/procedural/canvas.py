"""The canvas: draws one frame, band by band, from the backdrop to what lies on top of everything.

Bands of rows stay in the processor's cache, so memory is the finished picture plus little.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from img_serving.engines.procedural.backdrop import Backdrop
from img_serving.engines.procedural.bodies import Bodies
from img_serving.engines.procedural.fields import Array
from img_serving.engines.procedural.finish import Finish
from img_serving.engines.procedural.foreground import stamps
from img_serving.engines.procedural.frame import Frame
from img_serving.engines.procedural.land import land
from img_serving.engines.procedural.lighthouse import Lighthouse
from img_serving.engines.procedural.ranges import Ground
from img_serving.engines.procedural.stars import Stars
from img_serving.engines.procedural.water import Water

Pause = Callable[[], None]
"""Called every few milliseconds of drawing: what it raises ends it."""


def draw(frame: Frame, pause: Pause) -> Array:
    """Draw: uint8 [height, width, 3]."""
    scene = frame.scene
    image = np.empty((frame.height, frame.width, 3), np.uint8)
    backdrop = Backdrop(frame)
    pause()
    finish = Finish(frame)
    stars = Stars(frame) if scene.stars else None
    bodies = Bodies(frame)
    ranges, fronts = land(frame)
    ground = Ground(frame, ranges + fronts)
    water = Water(frame) if scene.water else None
    lighthouse = Lighthouse(frame) if scene.lighthouse and not frame.open else None
    for first, last in _bands(frame):
        pause()
        if water is not None and first >= frame.horizon:
            planes = water.reflect(image, first, last)
            if lighthouse is not None:
                lighthouse.show(planes, first, last)
            ground.lay(planes, fronts, first, last)
        else:
            shown = ranges if water is not None else ranges + fronts
            planes = np.zeros((3, last - first, frame.width), np.float32)
            if not any(one.hides(first) for one in shown):
                backdrop.fill(planes, first, last)
                if stars is not None:
                    stars.shine(planes, first, last)
                bodies.show(planes, first, last)
                if lighthouse is not None:
                    lighthouse.beam(planes, first, last)
            if lighthouse is None:
                ground.lay(planes, shown, first, last)
            else:
                ground.lay(planes, ranges, first, last)
                lighthouse.show(planes, first, last)
                ground.lay(planes, shown[len(ranges) :], first, last)
        finish.write(planes, image, first, last)
    for stamp in stamps(frame):
        pause()
        stamp.press(frame, image)
    return image


def _bands(frame: Frame) -> list[tuple[int, int]]:
    """The first row of each band and the one after its last."""
    step = max(8, min(128, 65536 // frame.width))
    edges = {*range(0, frame.height, step), frame.height}
    if frame.scene.water:
        edges.add(frame.horizon)  # water mirrors finished rows: no band may have both
    return list(pairwise(sorted(edges)))
