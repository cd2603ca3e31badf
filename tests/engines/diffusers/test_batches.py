"""How calls are taken apart into batches, and what running out of memory teaches."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img_serving.engines.diffusers.batches import Limits, Part, plan


def shown(parts: list[Part]) -> str:
    return " ".join(f"{part.take}/{part.size}" for part in parts)


@pytest.mark.parametrize(
    ("count", "buckets", "most", "expected"),
    [
        (1, (1, 2, 4, 8), 8, "1/1"),
        (3, (1, 2, 4, 8), 8, "3/4"),
        (5, (1, 2, 4, 8), 8, "4/4 1/1"),
        (6, (1, 2, 4, 8), 8, "6/8"),
        (11, (1, 2, 4, 8), 20, "8/8 3/4"),
        (1, (4,), 4, "1/4"),
        (5, (4,), 8, "4/4 1/4"),
        (4, (1, 2, 4, 8), 2, "2/2 2/2"),
        (4, (4,), 2, "2/2 2/2"),
        (3, (4,), 2, "2/2 1/2"),
        (5, (), 8, "5/5"),
        (5, (), 2, "2/2 2/2 1/1"),
        (0, (1, 2), 2, ""),
    ],
)
def test_a_call_is_taken_apart(count: int, buckets: tuple[int, ...], most: int, expected: str) -> None:
    assert shown(plan(count, buckets, most)) == expected


BUCKETS = st.lists(st.integers(1, 16), unique=True, max_size=5).map(sorted).map(tuple)


@given(st.integers(0, 40), BUCKETS, st.integers(1, 20))
def test_every_picture_is_drawn_once_and_no_part_is_too_large(count: int, buckets: tuple[int, ...], most: int) -> None:
    parts = plan(count, buckets, most)
    assert sum(part.take for part in parts) == count
    assert all(1 <= part.take <= part.size <= most for part in parts)
    usable = [size for size in buckets if size <= most]
    assert not usable or all(part.size in usable for part in parts)


@given(st.integers(1, 40), st.integers(1, 16))
def test_one_bucket_means_one_size_whoever_is_there(count: int, bucket: int) -> None:
    assert {part.size for part in plan(count, (bucket,), bucket)} == {bucket}


def test_a_limit_holds_for_larger_pictures_too_and_never_grows() -> None:
    limits = Limits()
    assert limits.most(100, 8) == 8
    assert limits.learn(100, 8) == 4
    assert (limits.most(99, 8), limits.most(100, 8), limits.most(200, 8)) == (8, 4, 4)
    assert limits.learn(200, 4) == 2
    assert (limits.most(100, 8), limits.most(200, 8), limits.most(200, 1)) == (4, 2, 1)
    assert limits.known() == {100: 4, 200: 2}
    assert limits.learn(50, 3) == 1
    assert limits.most(1000, 8) == 1
