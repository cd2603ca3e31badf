"""Which waiting tasks may share one call, as the adapter's batch shape allows."""

from __future__ import annotations

from collections.abc import Iterable

from img_serving.domain.capabilities import BatchShape, Capabilities
from img_serving.domain.images import ImageRequest
from img_serving.domain.jobs import Task
from img_serving.policy.cost import pixels_of
from img_serving.policy.endpoint import EndpointState

LOOK_AHEAD = 64
"""Waiting tasks looked at when a batch is filled: bounds the cost of a decision, whatever the queue's length."""


MAX_INPUT_BYTES = 64 * 1024 * 1024
"""Input images of one call, all members of several requests together: calls must fit into one message."""


def shared_part(request: ImageRequest) -> tuple[object, ...]:
    """What all members of any batch have in common: one call carries one of each.

    Of input images that is how many there are, and their size where the picture keeps it.
    """
    return (
        request.operation,
        request.model,
        request.width,
        request.height,
        request.steps,
        request.guidance_scale,
        request.quality,
        request.style,
        request.background,
        request.moderation,
        request.sampler,
        request.scheduler,
        request.clip_skip,
        request.output_format,
        request.output_compression,
        request.user,
        request.strength,
        len(request.images),
        request.mask is None,
        None if request.width is not None else [(one.width, one.height) for one in request.images[:1]],
    )


def may_share(shape: BatchShape, members: list[Task], other: Task) -> bool:
    """Whether `other` may join `members` in a call of this shape. Parts of one job always share everything but the seed."""
    first = members[0]
    if shape == "single" or first.alone or other.alone or other.tried != first.tried:
        return False
    if shape == "request":
        # an upstream that streams does not say whose an unfinished picture is
        return other.job is first.job and not first.job.request.seed_given and not first.job.request.previews
    ours, theirs = first.job.request, other.job.request
    if other.job is not first.job and shared_part(ours) != shared_part(theirs):
        return False
    if shape == "seeds":
        return (
            theirs.images == ours.images
            and theirs.mask == ours.mask
            and theirs.prompt == ours.prompt
            and theirs.negative_prompt == ours.negative_prompt
            and other.seed == members[-1].seed + 1
        )
    return not theirs.images or sum(map(_input_bytes, members)) + _input_bytes(other) <= MAX_INPUT_BYTES


def _input_bytes(task: Task) -> int:
    request = task.job.request
    mask = 0 if request.mask is None else request.mask.size_bytes
    return mask + sum(one.size_bytes for one in request.images)


def able_for(endpoint: EndpointState, task: Task) -> Capabilities:
    """What the endpoint can do with the model that the task would have there."""
    can = endpoint.capabilities
    if not can.variants:
        return can
    return can.of(next((one.model for one in task.job.route if one.backend == endpoint.backend), None))


def company_limit(endpoint: EndpointState, task: Task) -> int:
    """How many pictures like this task's fit into one call of the endpoint: by their number, and by their pixels."""
    limit = endpoint.max_batch_size
    if endpoint.capabilities.variants:
        limit = min(limit, able_for(endpoint, task).max_batch_size)
    if limit > 1 and endpoint.max_batch_pixels is not None:
        limit = max(1, min(limit, endpoint.max_batch_pixels // pixels_of(task.job.request)))
    return limit


def fill(shape: BatchShape, head: Task, waiting: Iterable[Task], limit: int) -> list[Task]:
    """`head` and the waiting tasks that may travel with it, at most `limit` in all, in the order of the queue."""
    members = [head]
    if limit <= 1 or shape == "single":
        return members
    for seen, task in enumerate(waiting):
        if len(members) >= limit or seen >= LOOK_AHEAD:
            break
        if may_share(shape, members, task):
            members.append(task)
    return members
