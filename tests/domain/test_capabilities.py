"""Sizes as engines round them, and models that differ from the rest."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.images import InputImage

steady = settings(deadline=None, derandomize=True)


@pytest.mark.parametrize(
    ("rule", "asked", "drawn"),
    [
        (SizeRule(), (100, 70), (100, 70)),
        (SizeRule(multiple=8), (100, 70), (96, 64)),  # Forge, seen
        (SizeRule(multiple=64, rounding="up"), (100, 70), (128, 128)),  # stable-diffusion.cpp, seen
        (SizeRule(multiple=16, rounding="nearest"), (100, 71), (96, 64)),
        (SizeRule(multiple=16, rounding="nearest"), (104, 72), (112, 80)),
        (SizeRule(multiple=8), (5, 3), (8, 8)),
        (SizeRule(multiple=8, min_side=60), (61, 61), (64, 64)),
    ],
)
def test_a_size_is_rounded_as_the_engine_would(rule, asked, drawn):
    assert rule.fit(*asked) == drawn


@given(
    st.integers(1, 4096),
    st.integers(1, 4096),
    st.sampled_from([1, 8, 16, 64]),
    st.sampled_from(["down", "up", "nearest"]),
)
@steady
def test_what_is_drawn_needs_no_more_rounding(width, height, multiple, rounding):
    rule = SizeRule(multiple=multiple, rounding=rounding)
    drawn = rule.fit(width, height)
    assert rule.fit(*drawn) == drawn
    assert all(side % multiple == 0 and side > 0 for side in drawn)
    assert all(abs(new - old) < multiple for new, old in zip(drawn, (width, height), strict=True))


@pytest.mark.parametrize(
    ("rule", "asked", "words"),
    [
        (SizeRule(choices=((256, 256), (512, 512))), (300, 300), "none of its sizes (256x256, 512x512)"),
        (SizeRule(min_side=64), (63, 64), "at least 64"),
        (SizeRule(max_side=64, multiple=64, rounding="up"), (65, 64), "at most 64"),
        (SizeRule(max_pixels=4096, multiple=64, rounding="up"), (65, 64), "over its 4096 pixels"),
        (SizeRule(max_ratio=3), (301, 100), "at most 3 times"),
    ],
)
def test_what_cannot_be_drawn_is_refused_with_the_reason(rule, asked, words):
    assert words in (rule.refusal(*asked) or "")


@pytest.mark.parametrize(
    ("rule", "asked"),
    [
        (SizeRule(choices=((256, 256),)), (256, 256)),
        (SizeRule(min_side=64, max_side=64, max_pixels=4096), (64, 64)),
        (SizeRule(max_side=64, multiple=64), (100, 100)),  # rounded down, it fits
        (SizeRule(max_ratio=3), (300, 100)),
        (SizeRule(), (65535, 1)),
    ],
)
def test_what_can_be_drawn_is_not_refused(rule, asked):
    assert rule.refusal(*asked) is None


def test_a_model_may_differ_from_the_rest():
    special = Capabilities(honours=frozenset({"seed"}))
    common = Capabilities(variants={"flux": special})
    assert common.of("flux") is special
    assert common.of("other") is common
    assert common.of(None) is common


@pytest.mark.parametrize(
    ("size", "pixels", "drawn"),
    [((512, 512), 1 << 20, (512, 512)), ((4000, 2000), 2_000_000, (2000, 1000)), ((60000, 1), 100, (2449, 1))],
)
def test_an_edit_keeps_the_shape_of_a_picture_that_is_too_large(size, pixels, drawn):
    assert InputImage(b"", "image/png", *size).fitted(pixels) == drawn
