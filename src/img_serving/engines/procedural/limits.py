"""What the painter takes: its name, its limits, its defaults, and the check that refuses everything else."""

from __future__ import annotations

from img_serving.domain.images import SEED_LIMIT
from img_serving.engines.engine import CannotDraw

MODEL = "procedural"
MIN_SIDE, MAX_SIDE, MAX_PIXELS = 16, 4096, 2048 * 2048
DEFAULT_STEPS, MAX_STEPS = 20, 1000
STEPS_OF_QUALITY = {"low": 8, "high": 40}
"""Quality is a matter of steps here, where nobody says how many."""
DEFAULT_GUIDANCE = 7.0
MAX_IMAGES = 16
"""Input pictures of one edit."""


def check(seed: int, guidance: float, steps: int, width: int, height: int) -> None:
    """Refuse what cannot be drawn.

    Raises:
        CannotDraw: which of them is out of range, and what would be right.
    """
    if not (min(width, height) >= MIN_SIDE and max(width, height) <= MAX_SIDE and width * height <= MAX_PIXELS):
        raise CannotDraw(
            f"the size must be from {MIN_SIDE} to {MAX_SIDE} pixels a side and at most {MAX_PIXELS} pixels in all, "
            f"not {width}x{height}",
            "size",
        )
    if not 0 <= seed < SEED_LIMIT:
        raise CannotDraw(f"the seed must be from 0 to 2**63 - 1, not {seed}", "seed")
    if not 0.0 <= guidance <= 100.0:
        raise CannotDraw(f"the guidance scale must be from 0 to 100, not {guidance}", "guidance_scale")
    if not 1 <= steps <= MAX_STEPS:
        raise CannotDraw(f"the number of steps must be from 1 to {MAX_STEPS}, not {steps}", "num_inference_steps")


def check_strength(strength: float) -> None:
    """Refuse a strength that is none.

    Raises:
        CannotDraw: it is not from 0 to 1.
    """
    if not 0.0 <= strength <= 1.0:
        raise CannotDraw(f"the strength must be from 0 to 1, not {strength}", "strength")
