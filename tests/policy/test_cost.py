"""What a picture costs, in megapixel-steps."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.images import ImageRequest
from img_serving.policy.cost import cost_of

steady = settings(deadline=None, derandomize=True)


def cost(**options) -> float:
    return cost_of(ImageRequest("cat", **options))


def test_pixels_times_steps_doubled_with_guidance():
    assert cost(width=1000, height=1000, steps=10, guidance_scale=7.0) == pytest.approx(20)
    assert cost(width=1000, height=1000, steps=10, guidance_scale=1.0) == pytest.approx(10)


def test_what_is_not_said_is_taken_as_usual():
    assert cost() == cost(width=1024, height=1024, steps=20, guidance_scale=7.5)


@steady
@given(
    st.integers(1, 10_000),
    st.integers(1, 10_000),
    st.integers(0, 200),
    st.none() | st.floats(0, 30),
    st.integers(1, 10),
)
def test_it_is_above_zero_never_smaller_for_more_and_the_same_whatever_n_is(width, height, steps, guidance, n):
    options = {"width": width, "height": height, "guidance_scale": guidance}
    one = cost(steps=steps, **options)
    assert 0 < one <= cost(steps=steps + 1, **options)
    assert one == cost(steps=steps, n=n, **options)
