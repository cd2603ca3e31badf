"""What is sent to a server of OpenAI's Images API: the body of a call, in the server's own dialect."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable, Iterator
from typing import Any, Final, Literal

import msgspec
import pybase64

from img_serving.backends.multipart import FilePart, encode_form
from img_serving.backends.openai.detect import NO_NAMES, Names
from img_serving.backends.openai.presets import ALWAYS_FIELDS, Edits, Parameters, Preset
from img_serving.backends.sdcpp import check_length, check_prompt, tagged
from img_serving.domain.errors import BackendRefusal, InvalidRequest
from img_serving.domain.images import EXTENSIONS, Call, ImageRequest, InputImage
from img_serving.media.masks import transparent_where_painted, white_where_painted

USUAL_PARTIALS: Final = 2
MOST_PARTIALS: Final = 3
"""The API gives no more."""

ATTRIBUTES: Final = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "quality": "quality",
    "style": "style",
    "background": "background",
    "moderation": "moderation",
    "output_format": "output_format",
    "output_compression": "output_compression",
    "user": "user",
    "sampler": "sampler",
    "scheduler": "scheduler",
    "clip_skip": "clip_skip",
    "strength": "strength",
}
"""Parameters that are sent where the client gave them, and the field of `ImageRequest` that holds each."""


_encode = msgspec.json.Encoder().encode
_NOTHING: Final[frozenset[str]] = frozenset()
_NOT_IN_GIVEN: Final = ("user", "output_format", "output_compression")
"""Whoever is asked for these is never told that they were ignored: the format is made here, and `user` is a note."""


class Draft(msgspec.Struct, frozen=True, gc=False):
    """A call as it is sent. `ignored`: what the client gave, the preset honours, and this operation has no place for."""

    route: Literal["generations", "edits", "variations"]
    body: bytes
    content_type: str
    ignored: frozenset[str] = frozenset()


def partial_images(call: Call) -> int:
    """How many unfinished pictures to ask for: as many as the client wants, for each is drawn, sent and paid for."""
    return min(call.request.previews, MOST_PARTIALS) or USUAL_PARTIALS


def draft(call: Call, preset: Preset, names: Names, *, stream: bool = False) -> Draft:
    """A generation in the dialect of `preset`.

    Raises:
        BackendRefusal: the dialect cannot say it.
    """
    body, ignored = request_fields(call, preset, names, stream=stream)
    return Draft("generations", _encode(body), "application/json", ignored)


async def draft_edit(call: Call, preset: Preset, edits: Edits, names: Names, *, stream: bool = False) -> Draft:
    """An edit in the dialect of `preset`; masks are converted in a thread.

    Raises:
        BackendRefusal: the dialect cannot say it, or the mask is no picture.
    """
    body, ignored = request_fields(call, preset, names, stream=stream)
    request = call.request
    if edits.shape != "multipart":
        body[edits.shape] = _inline(request.images[0], as_url=edits.shape == "image_url")
        return Draft("generations", _encode(body), "application/json", ignored)
    files = [*_image_parts(request), *await _mask_parts(request, edits)]
    form, content_type = encode_form([(name, _as_text(value)) for name, value in body.items()], files)
    return Draft("edits", form, content_type, ignored)


def draft_variation(call: Call, preset: Preset, names: Names) -> Draft:
    """A variation in the dialect of `preset`: a form without words.

    Raises:
        BackendRefusal: the dialect cannot say it.
    """
    body, ignored = request_fields(call, preset, names)
    del body["prompt"]
    fields = [(name, _as_text(value)) for name, value in body.items()]
    form, content_type = encode_form(fields, list(_image_parts(call.request)))
    return Draft("variations", form, content_type, ignored)


def request_fields(
    call: Call, preset: Preset, names: Names = NO_NAMES, *, stream: bool = False
) -> tuple[dict[str, Any], frozenset[str]]:
    """The body's fields, but for pictures, and what has no place in it: of the optional ones only what the client gave.

    Raises:
        BackendRefusal: the dialect cannot say it.
    """
    request, first = call.request, call.items[0]
    if preset.negative_after_bar:
        _without_bar(first.prompt)
    if preset.max_text_bytes is not None:
        check_length("prompt", first.prompt, preset.max_text_bytes)
    body: dict[str, Any] = {"prompt": first.prompt, "n": len(call.items), **_size(call, preset)}
    if call.model is not None:
        body["model"] = call.model
    if preset.response_format:
        body["response_format"] = preset.response_format
    if stream:
        body |= {"stream": True, "partial_images": partial_images(call)}
    extras: dict[str, Any] = {}
    known = preset.names(request.operation)
    ignored: set[str] = set()
    for name, value in _given(call, preset, known):
        if name not in known:
            if name not in _NOT_IN_GIVEN:
                ignored.add(name)
            continue
        if name == "negative_prompt" and preset.negative_after_bar:
            body["prompt"] += f"|{_without_bar(str(value))}"
            continue
        in_body = preset.placement == "fields" or name in ALWAYS_FIELDS
        _put(body if in_body else extras, known[name], _spelt(name, value, names))
    if extras or preset.extra or preset.placement == "prompt_tag":
        _place(preset, body, {**extras, **preset.extra})
    return body, frozenset(ignored) if ignored else _NOTHING


def _given(call: Call, preset: Preset, known: Parameters) -> list[tuple[str, Any]]:
    """What is to be honoured: everything that the client gave, and a seed where the server's own is always the same."""
    request, first = call.request, call.items[0]
    found: list[tuple[str, Any]] = []
    if request.seed_given or (preset.always_seed and "seed" in known):
        found.append(("seed", first.seed))
    names: Iterable[str] = request.given
    if request.output_format is not None or request.user is not None or request.output_compression is not None:
        names = request.given.union(_NOT_IN_GIVEN)
    for name in names:
        if name == "negative_prompt":
            value: Any = first.negative_prompt
        elif (attribute := ATTRIBUTES.get(name)) is not None:
            value = getattr(request, attribute)
        else:
            continue
        if name == "output_format":
            value = _format(request, preset)
        elif name == "output_compression" and _format(request, preset) != request.output_format:
            continue  # it is meant for the format that is made here
        elif name == "strength" and request.operation == "generation":
            continue
        if value is not None:
            found.append((name, value))
    return found


def _format(request: ImageRequest, preset: Preset) -> str | None:
    """The format to ask for: what the server does not write is made here, and then best of what loses nothing."""
    wanted = request.output_format
    if wanted is None or not preset.formats or wanted in preset.formats:
        return wanted
    return "png" if "png" in preset.formats else None


def _size(call: Call, preset: Preset) -> dict[str, Any]:
    width, height = preset.sizes.fit(call.width, call.height)
    if call.request.width is None:
        # nobody asked for it: the server's own default is better than an error, or than a shape that is nearly the picture's
        keeps = call.request.operation == "edit" and preset.edits is not None and preset.edits.keeps_size
        if keeps or preset.sizes.refusal(width, height) is not None:
            return {}
    if preset.size == "width_height":
        return {"width": width, "height": height}
    return {"size": f"{width}{'*' if preset.size == 'star' else 'x'}{height}"}


def _spelt(name: str, value: Any, names: Names) -> Any:
    """Samplers and schedules as the server spells them."""
    if names is NO_NAMES or name not in {"sampler", "scheduler"}:
        return value
    vocabulary = names.samplers if name == "sampler" else names.schedulers
    return value if vocabulary is None else vocabulary.find(value) or value


def _put(fields: dict[str, Any], path: str, value: Any) -> None:
    if "." not in path:
        fields[path] = value
        return
    *outer, last = path.split(".")
    for name in outer:
        fields = fields.setdefault(name, {})
    fields[last] = value


def _place(preset: Preset, body: dict[str, Any], extras: dict[str, Any]) -> None:
    """Put what is not OpenAI's own where this family looks for it."""
    if preset.placement == "prompt_tag":
        body["prompt"] += _tag(body["prompt"], extras, preset.max_text_bytes)
    elif preset.placement == "kwargs":
        body["kwargs"] = json.dumps(extras, ensure_ascii=False)
    else:
        body |= extras


def _tag(prompt: str, extras: dict[str, Any], max_bytes: int | None) -> str:
    """The tag that carries parameters to stable-diffusion.cpp, behind the prompt.

    Raises:
        BackendRefusal: the prompt has such a tag (it would go round the gateway's limits), or ours would be too long.
    """
    check_prompt(prompt)
    if not extras:
        return ""
    tag = tagged(extras)
    if max_bytes is not None:
        check_length("negative_prompt", tag, max_bytes)
    return tag


def _without_bar(text: str) -> str:
    """LocalAI cuts the prompt at each `|` and takes the second piece for the negative one. Raises BackendRefusal."""
    if "|" in text:
        raise BackendRefusal(
            InvalidRequest(
                "this backend takes what stands behind a | for the negative prompt: leave | out, and use negative_prompt",
                param="prompt",
            )
        )
    return text


def _as_text(value: Any) -> str:
    """A form has only text: JSON's own words for everything but text itself."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _inline(image: InputImage, *, as_url: bool) -> str:
    text = pybase64.b64encode(image.data).decode("ascii")
    return f"data:{image.media_type};base64,{text}" if as_url else text


def _image_parts(request: ImageRequest) -> Iterator[FilePart]:
    """One picture is `image`, several are `image[]`: as OpenAI's own clients send them."""
    name = "image" if len(request.images) == 1 else "image[]"
    for index, image in enumerate(request.images):
        yield FilePart(name, f"image-{index}.{EXTENSIONS[image.media_type]}", image.media_type, image.data)


async def _mask_parts(request: ImageRequest, edits: Edits) -> list[FilePart]:
    if request.mask is None or not edits.mask:
        return []
    convert = white_where_painted if edits.mask == "white" else transparent_where_painted
    try:
        mask = await asyncio.to_thread(convert, request.mask.data)
    except ValueError as error:
        raise BackendRefusal(InvalidRequest(f"mask: {error}", param="mask")) from None
    return [FilePart(edits.mask_field, "mask.png", "image/png", mask)]
