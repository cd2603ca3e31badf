"""The messages of the worker's service from and to our own values: one place for both ends of the wire."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, get_args

from img_serving.domain.capabilities import PARAMETERS, Capabilities, Rounding, SizeRule
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import (
    SEED_LIMIT,
    Artifact,
    Call,
    ImageRequest,
    InputImage,
    Item,
    ItemFailure,
    Operation,
    OutputFormat,
    Progress,
)
from img_serving.domain.vocabulary import Vocabulary
from img_serving.media.payload import raw_bytes
from img_serving.media.sniff import SIDE_LIMIT, check_picture
from img_serving.wire.pictures import chunk_event, picture_event
from img_serving.wire.v1 import generation_pb2 as pb

SERVICE: Final = "img_serving.v1.ImageGeneration"
GENERATE: Final = f"/{SERVICE}/Generate"
CAPABILITIES: Final = f"/{SERVICE}/Capabilities"

CHUNK_BYTES: Final = 1024 * 1024
"""Bytes of a picture in one message at most."""

MAX_INPUT_PIXELS: Final = 64 * 1024 * 1024
"""Pixels of one input image at most: a file of some kilobytes may unpack to gigabytes."""

MAX_ITEMS: Final = 1024
"""Items of one batch at most, whatever an engine says that it can."""

MAX_WORDS_CHARS: Final = 300
MAX_COUNT: Final = 2**32 - 1
MAX_PROMPT_CHARS: Final = 1_000_000
MAX_REQUEST_ID_CHARS: Final = 128
MAX_NAMES: Final = 1000
"""Samplers and the like of one model at most."""

_OPERATIONS: Final[dict[Operation, pb.Operation.ValueType]] = {
    "generation": pb.OPERATION_GENERATION,
    "edit": pb.OPERATION_EDIT,
    "variation": pb.OPERATION_VARIATION,
}
_ROUNDINGS: Final[dict[Rounding, pb.Rounding.ValueType]] = {
    "down": pb.ROUNDING_DOWN,
    "up": pb.ROUNDING_UP,
    "nearest": pb.ROUNDING_NEAREST,
}
_OPTIONAL: Final = (
    ("steps", "num_inference_steps"),
    ("guidance_scale", "guidance_scale"),
    ("strength", "strength"),
    ("sampler", "sampler"),
    ("scheduler", "scheduler"),
    ("clip_skip", "clip_skip"),
    ("quality", "quality"),
    ("style", "style"),
    ("background", "background"),
    ("output_format", "output_format"),
    ("output_compression", "output_compression"),
)
"""The optional fields of a call, and the parameter that each one is."""

_FORMATS: Final[tuple[OutputFormat, ...]] = get_args(OutputFormat)


# calls


def message_of(call: Call, honours: frozenset[str]) -> pb.GenerateRequest:
    """A call as a message: of the optional parameters only those that the worker `honours`; empty: all."""
    request = call.request
    message = pb.GenerateRequest(
        request_id=call.request_id,
        model=call.model or "",
        operation=_OPERATIONS[request.operation],
        width=call.width,
        height=call.height,
        previews=call.previews,
    )
    for field, parameter in _OPTIONAL:
        value = getattr(request, field)
        if value is not None and (not honours or parameter in honours):
            setattr(message, field, value)
    with_negative = not honours or "negative_prompt" in honours
    for item in call.items:
        added = message.items.add(prompt=item.prompt, seed=item.seed)
        if item.negative_prompt is not None and with_negative:
            added.negative_prompt = item.negative_prompt
        added.images.extend(pb.InputImage(data=one.data, media_type=one.media_type) for one in item.images)
        if item.mask is not None:
            added.mask.CopyFrom(pb.InputImage(data=item.mask.data, media_type=item.mask.media_type))
    return message


def check_counts(message: pb.GenerateRequest, *, max_items: int, max_images: int) -> None:
    """Refuse what is too much, before anything in it is looked at.

    Raises:
        InvalidRequest: how many items, or input images of one, there may be.
    """
    if len(message.items) > max_items:
        raise InvalidRequest(f"a batch has at most {max_items} items, not {len(message.items)}", param="items")
    if any(len(item.images) > max_images for item in message.items):
        raise InvalidRequest(f"an item has at most {max_images} input image{'s'[: max_images != 1]}", param="image")


def call_of(message: pb.GenerateRequest, *, timeout_seconds: float) -> Call:
    """A message as a call, checked. With input images it takes its time: not for an event loop.

    Raises:
        InvalidRequest: what is wrong, and with which parameter.
    """
    operation = next((name for name, value in _OPERATIONS.items() if value == message.operation), None)
    if message.operation == pb.OPERATION_UNSPECIFIED:
        operation = "generation"
    if operation is None:
        raise InvalidRequest(f"operation {message.operation} is not known", param="operation")
    if not message.items:
        raise InvalidRequest("there is no item: a batch has at least one", param="items")
    if not (message.width and message.height):
        raise InvalidRequest("width and height must be at least 1 pixel", param="size")
    items = tuple(_item_of(item, operation) for item in message.items)
    request_id = message.request_id
    first = items[0]
    output_format = next((one for one in _FORMATS if one == message.output_format), None)
    there = {field.name for field, _ in message.ListFields()}
    request = ImageRequest(
        prompt=first.prompt,
        operation=operation,
        model=message.model or None,
        n=len(items),
        width=message.width,
        height=message.height,
        negative_prompt=first.negative_prompt,
        seed=first.seed,
        seed_given=True,
        steps=message.steps if message.HasField("steps") else None,
        guidance_scale=message.guidance_scale if message.HasField("guidance_scale") else None,
        strength=message.strength if message.HasField("strength") else None,
        sampler=message.sampler if message.HasField("sampler") else None,
        scheduler=message.scheduler if message.HasField("scheduler") else None,
        clip_skip=message.clip_skip if message.HasField("clip_skip") else None,
        quality=message.quality if message.HasField("quality") else None,
        style=message.style if message.HasField("style") else None,
        background=message.background if message.HasField("background") else None,
        output_format=output_format,
        output_compression=message.output_compression if message.HasField("output_compression") else None,
        images=first.images,
        mask=first.mask,
        given=frozenset(parameter for field, parameter in _OPTIONAL if field in there),
    )
    if request.strength is not None and not 0 <= request.strength <= 1:
        raise InvalidRequest(f"strength must be from 0 to 1, not {request.strength:g}", param="strength")
    if request.guidance_scale is not None and not 0 <= request.guidance_scale < float("inf"):
        raise InvalidRequest("guidance_scale must be 0 or more", param="guidance_scale")
    return Call(
        request=request,
        model=message.model or None,
        width=message.width,
        height=message.height,
        items=items,
        timeout_seconds=timeout_seconds,
        request_id=request_id if len(request_id) <= MAX_REQUEST_ID_CHARS and _is_plain(request_id) else "",
        previews=message.previews,
    )


def _is_plain(text: str) -> bool:
    """Whether it may stand in metadata and in a log."""
    return all(" " <= char <= "~" for char in text)


def _item_of(item: pb.Item, operation: Operation) -> Item:
    if not 0 <= item.seed < SEED_LIMIT:
        raise InvalidRequest(f"a seed must be from 0 to 2**63 - 1, not {item.seed}", param="seed")
    if max(len(item.prompt), len(item.negative_prompt)) > MAX_PROMPT_CHARS:
        raise InvalidRequest(f"a prompt may have at most {MAX_PROMPT_CHARS} characters", param="prompt")
    if operation != "generation" and not item.images:
        raise InvalidRequest(f"an item of an {operation} needs an input image", param="image")
    mask = _image_of(item.mask, "mask") if item.HasField("mask") else None
    images = tuple(_image_of(one, "image") for one in item.images)
    if mask is not None and (not images or (mask.width, mask.height) != (images[0].width, images[0].height)):
        raise InvalidRequest("a mask has the size of the first input image", param="mask")
    return Item(
        item.prompt, item.negative_prompt if item.HasField("negative_prompt") else None, item.seed, images, mask
    )


def _image_of(image: pb.InputImage, param: str) -> InputImage:
    try:
        media_type, width, height = check_picture(image.data)
    except ValueError as error:
        raise InvalidRequest(f"an input image is no use: {error}", param=param) from None
    if width * height > MAX_INPUT_PIXELS:
        raise InvalidRequest(f"an input image may have at most {MAX_INPUT_PIXELS} pixels", param=param)
    return InputImage(image.data, media_type, width, height)


# events


def progress_events(progress: Progress) -> Iterator[pb.GenerateEvent]:
    """How far a batch is, after what it looks like by then, if that is known and fits into a message."""
    preview = progress.preview
    if preview is not None and len(preview.data) <= CHUNK_BYTES and 0 <= preview.index < MAX_ITEMS:
        share = None if preview.share is None else min(1.0, max(0.0, preview.share))
        shown = pb.Preview(index=preview.index, data=preview.data, media_type=preview.media_type, share=share)
        yield pb.GenerateEvent(preview=shown)
    done, total = (min(max(0, round(one)), MAX_COUNT) for one in (progress.done, progress.total))
    yield pb.GenerateEvent(progress=pb.Progress(done=done, total=total))


def result_events(results: Iterable[Artifact | ItemFailure]) -> Iterator[pb.GenerateEvent | bytes]:
    """Pictures (encoded already) and failures, one after the other, and the end."""
    for index, result in enumerate(results):
        if isinstance(result, ItemFailure):
            words = result.message[:MAX_WORDS_CHARS].encode("utf-8", "replace").decode()
            error = pb.ItemError(index=index, message=words, refused=result.refused)
            yield pb.GenerateEvent(error=error)
            continue
        data = memoryview(raw_bytes(result))
        head = pb.Picture(
            index=index,
            media_type=result.media_type,
            size_bytes=len(data),
            seed=result.seed,
            revised_prompt=result.revised_prompt,
            ignored=result.ignored,
        )
        yield picture_event(head, data[:CHUNK_BYTES])
        for start in range(CHUNK_BYTES, len(data), CHUNK_BYTES):
            yield chunk_event(index, data[start : start + CHUNK_BYTES])
    yield pb.GenerateEvent(done=pb.Done())


# capabilities


def model_message(model: str, can: Capabilities) -> pb.Model:
    """What a model can do, as a message."""
    sizes, default = can.sizes, can.default_size or (0, 0)
    return pb.Model(
        id=model,
        operations=sorted(value for name, value in _OPERATIONS.items() if name in can.operations),
        max_batch_size=can.max_batch_size,
        honours=sorted(can.honours),
        sizes=pb.Sizes(
            multiple=sizes.multiple,
            rounding=_ROUNDINGS[sizes.rounding],
            min_side=sizes.min_side,
            max_side=sizes.max_side or 0,
            max_pixels=sizes.max_pixels or 0,
        ),
        default_width=default[0],
        default_height=default[1],
        max_steps=can.max_steps or 0,
        max_images=can.max_images,
        masks=can.masks,
        samplers=can.samplers.spellings if can.samplers is not None else (),
        schedulers=can.schedulers.spellings if can.schedulers is not None else (),
        formats=can.formats,
        previews=can.previews,
        honours_in_edits=sorted(can.honours_in_edits or ()),
    )


def capabilities_of(message: pb.Model, *, slots: int, any_model: bool = False) -> Capabilities:
    """What a message says that a model can do; names and values that we do not know are left out.

    `slots` are the calls that its worker draws at the same time.
    """
    names = {value: name for name, value in _OPERATIONS.items()}
    roundings = {value: name for name, value in _ROUNDINGS.items()}
    sizes = message.sizes
    return Capabilities(
        operations=frozenset(names[one] for one in message.operations if one in names) or frozenset({"generation"}),
        batch="items",
        max_batch_size=max(1, message.max_batch_size),
        max_concurrency=max(1, slots),
        honours=frozenset(message.honours) & PARAMETERS,
        honours_in_edits=frozenset(message.honours_in_edits) & PARAMETERS if message.honours_in_edits else None,
        sizes=SizeRule(
            multiple=max(1, sizes.multiple),
            rounding=roundings.get(sizes.rounding, "down"),
            min_side=max(1, sizes.min_side),
            max_side=sizes.max_side or None,
            max_pixels=sizes.max_pixels or None,
        ),
        default_size=(message.default_width, message.default_height)
        if 0 < message.default_width <= SIDE_LIMIT and 0 < message.default_height <= SIDE_LIMIT
        else None,
        max_steps=message.max_steps or None,
        max_images=max(1, message.max_images),
        masks=message.masks,
        samplers=Vocabulary(message.samplers[:MAX_NAMES]) if message.samplers else None,
        schedulers=Vocabulary(message.schedulers[:MAX_NAMES]) if message.schedulers else None,
        formats=tuple(one for one in _FORMATS if one in message.formats),
        progress=True,
        previews=message.previews,
        cancels=True,
        any_model=any_model,
    )
