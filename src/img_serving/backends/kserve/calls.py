"""A call as the model's own request: every parameter in its tensor, one row a picture where the model has rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pybase64

from img_serving.backends.kserve.pictures import pixels_from, raw_pixels
from img_serving.backends.kserve.signature import FALLBACKS, Signature, TensorInfo, fixed_shape
from img_serving.backends.kserve.tensors import Value, pack, wrapped
from img_serving.domain.errors import BackendRefusal, InvalidRequest
from img_serving.domain.images import Call, InputImage, Item
from img_serving.media.masks import mask_in, white_where_painted
from img_serving.wire.inference.open_inference_pb2 import ModelInferRequest


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and the number of steps that it asks for, where it says one."""

    message: ModelInferRequest
    steps: int | None


def groups_of(items: Sequence[Item], signature: Signature) -> list[list[int]]:
    """Which items may share a request, by number.

    A tensor is there for all of them or for none, and a model may well draw otherwise without it than with an empty text: so
    items with a negative prompt and items without do not mix.
    """
    limit = signature.max_batch_size
    place = signature.places.get("negative_prompt")
    if place is None or place.is_required or place.name in signature.fixed:
        kinds = [list(range(len(items)))]
    else:
        with_one = [index for index, item in enumerate(items) if item.negative_prompt is not None]
        without = [index for index, item in enumerate(items) if item.negative_prompt is None]
        kinds = [with_one, without]
    return [kind[start : start + limit] for kind in kinds for start in range(0, len(kind), limit)]


def request_of(signature: Signature, call: Call, items: Sequence[Item], model: str) -> Request:
    """The request for these items of the call. Decodes pictures where the model wants pixels: for a thread, then.

    Raises:
        BackendRefusal: a value does not fit into its tensor, or a picture cannot be read.
        Unfit: the operator's values do not fit into theirs.
    """
    message = ModelInferRequest(model_name=model, model_version=signature.options.version, id=call.request_id)
    for name, value in signature.options.parameters.items():
        parameter = message.parameters[name]
        if isinstance(value, bool):
            parameter.bool_param = value
        elif isinstance(value, int):
            parameter.int64_param = value
        else:
            parameter.string_param = value
    width, height = signature.capabilities.sizes.fit(call.width, call.height)
    steps = None
    sent = set()
    for name, tensor in signature.places.items():
        if name in {"image", "mask"}:
            if call.request.images:
                _add_pictures(message, name, tensor, signature, items, size=(width, height))
                sent.add(tensor.name)
            continue
        values = _values(name, tensor, signature, call, items, size=(width, height))
        if values is None:
            continue
        if name == "steps":
            steps = round(float(values[0]))
        shape = signature.shape_of(tensor, len(items))
        try:
            data = pack(tensor.datatype, values if signature.counts(tensor) else values[:1])
        except ValueError as error:
            raise BackendRefusal(InvalidRequest(f"{error}", param=_PARAMS.get(name, name))) from None
        _add(message, tensor, shape, data)
        sent.add(tensor.name)
    for fixed in signature.fixed.values():
        if fixed.tensor.name not in sent:
            shape, repeats = fixed_shape(signature, fixed, len(items))
            _add(message, fixed.tensor, shape, pack(fixed.tensor.datatype, fixed.values) * repeats)
            place = signature.places.get("steps")
            if place is not None and place.name == fixed.tensor.name:
                steps = round(float(fixed.values[0]))
    if signature.output is not None:
        message.outputs.add(name=signature.output.name)
        if signature.is_stream and signature.step_output is not None:
            message.outputs.add(name=signature.step_output)
    return Request(message, steps)


_PARAMS = {"steps": "num_inference_steps", "width": "size", "height": "size"}


def _values(
    name: str, tensor: TensorInfo, signature: Signature, call: Call, items: Sequence[Item], *, size: tuple[int, int]
) -> Sequence[Value] | None:
    """A value for each item; None where there is nothing to say, so that the model or the operator says it."""
    request = call.request
    found: Sequence[Value | None]
    if name == "prompt":
        found = [item.prompt for item in items]
    elif name == "negative_prompt":
        found = [item.negative_prompt for item in items]
        if any(found):
            found = [text or "" for text in found]
    elif name == "seed":
        found = [wrapped(tensor.datatype, item.seed) for item in items]
    else:
        shared: dict[str, Value | None] = {
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "width": size[0],
            "height": size[1],
            "strength": request.usual_strength if request.images else None,
            "sampler": request.sampler,
            "scheduler": request.scheduler,
            "clip_skip": request.clip_skip,
            "count": 1,
        }
        found = [shared[name]] * len(items)
    given = [one for one in found if one is not None]
    if len(given) == len(items):
        return given
    if tensor.is_required and tensor.name not in signature.fixed:
        return [FALLBACKS[name]] * len(items)
    return None


def _add_pictures(
    message: ModelInferRequest,
    name: str,
    tensor: TensorInfo,
    signature: Signature,
    items: Sequence[Item],
    *,
    size: tuple[int, int],
) -> None:
    is_mask = name == "mask"
    try:
        files = [_mask(item, tensor) if is_mask else item.images[0].data for item in items]
        if None in files:
            return
        given = [one for one in files if one is not None]
        if tensor.datatype == "BYTES":
            if signature.options.encoding == "base64":
                given = [pybase64.b64encode(one) for one in given]
            _add(message, tensor, signature.shape_of(tensor, len(items)), pack("BYTES", given))
            return
        *lead, first, second, last = (*(1 for _ in range(3 - len(tensor.shape))), *tensor.shape)
        layout = signature.options.layout or ("chw" if first in {1, 3} and last not in {1, 3} else "hwc")
        sides = (first, second) if layout == "hwc" else (second, last)
        height, width = (own if own > 0 else ours for own, ours in zip(sides, (size[1], size[0]), strict=True))
        pixels = [pixels_from(one, width, height, is_mask=is_mask) for one in given]
        colours = 1 if is_mask else 3
        drawn = (height, width, colours) if layout == "hwc" else (colours, height, width)
        data = raw_pixels(pixels, tensor.datatype, layout, signature.options, is_mask=is_mask)
        _add(message, tensor, (*_leading(lead, len(items)), *drawn), data)
    except ValueError as error:
        raise BackendRefusal(InvalidRequest(str(error), param=name)) from None


def _mask(item: Item, tensor: TensorInfo) -> bytes | None:
    """White where it may be painted. An edit without a mask paints everywhere, where the model insists on one."""
    mask: InputImage | None = item.mask
    if mask is None:
        return white_where_painted(mask_in(item.images[0].data)) if tensor.is_required else None
    return white_where_painted(mask.data)


def _leading(lead: Sequence[int], rows: int) -> tuple[int, ...]:
    """The sides before those of a picture: as many as there are pictures, all told."""
    return (rows, *(1 for _ in lead[1:])) if lead else ()


def _add(message: ModelInferRequest, tensor: TensorInfo, shape: Sequence[int], data: bytes) -> None:
    message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=shape)
    message.raw_input_contents.append(data)
