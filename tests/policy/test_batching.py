"""Which tasks may share a call, by what the adapter can do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.policy.virtual_fleet import endpoint

from img_serving.domain.images import SEED_LIMIT, ImageRequest, InputImage
from img_serving.domain.jobs import Job, Target, Task
from img_serving.domain.tenants import ANONYMOUS
from img_serving.policy.batching import (
    LOOK_AHEAD,
    MAX_INPUT_BYTES,
    able_for,
    company_limit,
    fill,
    may_share,
    shared_part,
)

steady = settings(deadline=None, derandomize=True)

PER_ITEM = {"prompt", "negative_prompt", "seed"}
NOT_DRAWN = {"n", "backend", "seed_given", "strict", "given", "previews"}
"""What says how a request is handled and not what is drawn."""
OTHER: dict[str, Any] = {
    "operation": "edit",
    "model": "other",
    "width": 64,
    "height": 64,
    "steps": 7,
    "guidance_scale": 3.0,
    "quality": "hd",
    "style": "vivid",
    "background": "transparent",
    "moderation": "low",
    "sampler": "euler",
    "scheduler": "karras",
    "clip_skip": 2,
    "output_format": "webp",
    "output_compression": 50,
    "user": "somebody",
    "images": (InputImage(b"png", "image/png", 8, 8),),
    "mask": InputImage(b"mask", "image/png", 8, 8),
    "strength": 0.5,
}


def tasks(prompt: str = "cat", **options: Any) -> list[Task]:
    request = ImageRequest(prompt, **options)
    return Job("id", request, (Target("a", None),), ANONYMOUS, submitted_at=0, deadline=100).tasks


def test_watched_pictures_of_a_request_travel_alone_where_nobody_says_whose_a_preview_is():
    first, second = tasks(n=2)
    assert may_share("request", [first], second)
    first, second = tasks(n=2, previews=1)
    assert not may_share("request", [first], second)
    assert may_share("seeds", [first], second)


def test_inputs_that_wait_on_disk_count_like_those_in_memory():
    half = InputImage(b"", "image/png", 8, 8, "img-1.png", MAX_INPUT_BYTES // 2)
    first, second, third = (tasks(operation="edit", images=(half,))[0] for _ in range(3))
    assert may_share("items", [first], second)
    assert not may_share("items", [first, second], third)


def test_a_single_shape_never_shares():
    first, second = tasks(n=2)
    assert not may_share("single", [first], second)
    assert fill("single", first, [second], 8) == [first]


def test_the_request_shape_shares_within_one_job_without_a_clients_seed():
    first, second = tasks(n=2)
    (stranger,) = tasks()
    assert may_share("request", [first], second)
    assert not may_share("request", [first], stranger)
    first, second = tasks(n=2, seed=5, seed_given=True)
    assert not may_share("request", [first], second)


def test_the_seeds_shape_needs_one_prompt_and_consecutive_seeds():
    (first,) = tasks(seed=5)
    assert may_share("seeds", [first], tasks(seed=6)[0])
    for seed in (4, 5, 7):
        assert not may_share("seeds", [first], tasks(seed=seed)[0])
    assert not may_share("seeds", [first], tasks("dog", seed=6)[0])
    assert not may_share("seeds", [first], tasks(seed=6, negative_prompt="blur")[0])


def test_seeds_that_wrap_around_are_not_consecutive():
    last, wrapped = tasks(n=2, seed=SEED_LIMIT - 1)
    assert wrapped.seed == 0
    assert not may_share("seeds", [last], wrapped)


def test_the_items_shape_takes_any_prompt_and_seed():
    (first,) = tasks(seed=5)
    assert may_share("items", [first], tasks("dog", seed=99, negative_prompt="blur")[0])


def picture(data: bytes = b"png", side: int = 8) -> InputImage:
    return InputImage(data, "image/png", side, side)


def test_the_items_shape_takes_any_input_image_of_the_same_kind():
    (first,) = tasks(operation="edit", images=(picture(),))
    (other,) = tasks("dog", operation="edit", images=(picture(b"other"),))
    assert may_share("items", [first], other)
    assert not may_share("seeds", [first], tasks(operation="edit", images=(picture(b"other"),), seed=1)[0])
    assert not may_share("items", [first], tasks(operation="edit", images=(picture(), picture()))[0])
    assert not may_share("items", [first], tasks(operation="edit", images=(picture(),), mask=picture())[0])


def test_pictures_that_keep_their_size_share_only_with_those_of_the_same_size():
    small, large = ((picture(side=side),) for side in (8, 16))
    assert not may_share("items", tasks(operation="edit", images=small), tasks(operation="edit", images=large)[0])
    given: dict[str, Any] = {"operation": "edit", "width": 64, "height": 64}
    assert may_share("items", tasks(**given, images=small), tasks(**given, images=large)[0])


def test_input_images_of_one_call_are_bounded_together():
    half = picture(bytes(MAX_INPUT_BYTES // 2))
    first, second, third = (tasks(operation="edit", images=(half,))[0] for _ in range(3))
    assert may_share("items", [first], second)
    assert not may_share("items", [first, second], third)


def test_every_field_of_a_request_is_shared_per_item_or_not_drawn():
    """A field added later has to be put somewhere, or pictures would be drawn with a stranger's settings."""
    assert set(ImageRequest.__struct_fields__) == PER_ITEM | NOT_DRAWN | set(OTHER)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_requests_that_differ_in_what_a_call_carries_once_do_not_share(name):
    assert shared_part(ImageRequest("cat")) != shared_part(ImageRequest("cat", **{name: OTHER[name]}))
    (first,), (second,) = tasks(seed=5), tasks(seed=6, **{name: OTHER[name]})
    for shape in ("single", "request", "seeds", "items"):
        assert not may_share(shape, [first], second)


def test_a_task_that_is_to_be_tried_alone_shares_with_nobody():
    first, second = tasks(n=2)
    second.alone = True
    assert not may_share("items", [first], second)
    assert not may_share("items", [second], first)


def test_tasks_that_tried_different_endpoints_do_not_share():
    first, second = tasks(n=2)
    second.tried.add(1)
    assert not may_share("items", [first], second)


def test_a_batch_is_filled_in_the_order_of_the_queue_past_those_that_do_not_fit():
    head, *waiting = tasks() + tasks(steps=9) + tasks("dog") + tasks(steps=9) + tasks("cow") + tasks("pig")
    assert [task.job.request.prompt for task in fill("items", head, waiting, 3)] == ["cat", "dog", "cow"]


def test_only_so_many_are_looked_at():
    head, *waiting = tasks() + [task for _ in range(LOOK_AHEAD) for task in tasks(steps=9)] + tasks()
    assert fill("items", head, waiting, 8) == [head]


@steady
@given(
    shape=st.sampled_from(["single", "request", "seeds", "items"]),
    limit=st.integers(1, 6),
    specs=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 4), st.integers(1, 3), st.booleans()), min_size=1),
)
def test_a_batch_is_never_over_its_limit_and_never_changes_the_order(shape, limit, specs):
    head, *waiting = [
        task for prompt, seed, n, given_ in specs for task in tasks(prompt, seed=seed, n=n, seed_given=given_)
    ]
    members = fill(shape, head, waiting, limit)
    assert 1 <= len(members) <= limit
    assert members[0] is head
    places = [waiting.index(task) for task in members[1:]]
    assert places == sorted(set(places))
    for count in range(1, len(members)):
        assert may_share(shape, members[:count], members[count])


def test_a_model_that_draws_one_picture_a_call_gets_one_picture_a_call():
    one = endpoint(0, size=10, shape="request")
    one.capabilities = replace(
        one.capabilities, variants={"m": replace(one.capabilities, max_batch_size=1, batch="single")}
    )
    special = Job("id", ImageRequest("cat", n=3), (Target("a", "m"),), ANONYMOUS, submitted_at=0, deadline=100).tasks[0]
    assert (company_limit(one, special), able_for(one, special).batch) == (1, "single")
    assert company_limit(one, tasks(n=3)[0]) == 10
