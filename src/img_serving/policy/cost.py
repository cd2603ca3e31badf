"""What a picture costs, in megapixel-steps: the unit of estimates, fairness and least_work."""

from __future__ import annotations

from img_serving.domain.images import ImageRequest

DEFAULT_STEPS = 20
DEFAULT_PIXELS = 1024 * 1024


def pixels_of(request: ImageRequest) -> int:
    """Pixels of one picture."""
    return request.width * request.height if request.width and request.height else DEFAULT_PIXELS


def cost_of(request: ImageRequest) -> float:
    """Megapixel-steps of one picture: pixels x steps, doubled with guidance (two passes of the model a step)."""
    pixels = pixels_of(request)
    steps = request.steps if request.steps is not None else DEFAULT_STEPS
    passes = 1 if request.guidance_scale is not None and request.guidance_scale <= 1 else 2
    return max(pixels * steps * passes / 1e6, 1e-6)
