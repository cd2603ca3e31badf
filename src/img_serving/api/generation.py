"""The body of an image generation as clients send it, and how it becomes an `ImageRequest`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, structs

from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import SEED_LIMIT, ImageRequest, Operation, OutputFormat
from img_serving.domain.stored import ResponseFormat
from img_serving.gateway.identifiers import random_bytes

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_INLINE_MODELS = re.compile(r"(chatgpt-image|gpt-image)")
"""Clients of these model names expect base64 without asking for it, as the vendor's own API answers."""

MAX_GUIDANCE = 100.0
MAX_NAME_CHARS = 256
"""Of a model, a backend or a sampler: names are remembered, so they must not be megabytes."""

MAX_UNKNOWN = 8
"""Fields that nobody knows and that are named in the reply; they go into a header, so they are short words only."""

_SHOWABLE = re.compile(r"[A-Za-z0-9_.-]{1,40}")
_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])

_T = TypeVar("_T")


class GenerationBody(msgspec.Struct, kw_only=True, gc=False):
    """Body of `POST /v1/images/generations`. `null` means default; unknown fields are ignored, and named as such."""

    prompt: Annotated[str, Meta(description="What to draw.", min_length=1)]
    model: Annotated[
        Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None,
        Meta(description="A model of GET /v1/models, an alias, or a backend's name."),
    ] = None
    n: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None, Meta(description="How many pictures (default 1).")
    ] = None
    size: Annotated[str | None, Meta(description='"WIDTHxHEIGHT" in pixels, or "auto": the backend\'s default.')] = None
    quality: Annotated[
        Literal["auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"] | None,
        Meta(description="How much effort to spend."),
    ] = None
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "transparent", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    response_format: Annotated[
        Literal["url", "b64_json", "base64", "file"] | None, Meta(description="How pictures come back.")
    ] = None
    output_format: Annotated[
        Literal["png", "jpeg", "jpg", "webp"] | None, Meta(description="The format of the picture, whatever drew it.")
    ] = None
    output_compression: Annotated[
        Annotated[int, Meta(ge=0, le=100)] | None, Meta(description="Quality of JPEG and WebP, 0 to 100 (default 100).")
    ] = None
    stream: Annotated[bool | None, Meta(description="Answer with server-sent events.")] = None
    partial_images: Annotated[
        Annotated[int, Meta(ge=0, le=3)] | None,
        Meta(description="How many unfinished pictures to show of each (default 0)."),
    ] = None
    user: str | None = None
    cancel_on_disconnect: Annotated[
        bool | None, Meta(description="false: draw on when the client leaves; the result can be fetched as a job.")
    ] = None
    webhook_url: Annotated[
        Annotated[str, Meta(max_length=2048)] | None,
        Meta(description="Called when the job ends; goes with `Prefer: respond-async`."),
    ] = None
    negative_prompt: Annotated[str | None, Meta(description="What not to draw.")] = None
    seed: Annotated[
        Annotated[int, Meta(ge=-1)] | None,
        Meta(description="Picture i gets seed + i; the same seed gives the same picture. -1 or null: random."),
    ] = None
    guidance_scale: Annotated[float | None, Meta(description="How strongly the words bind the picture.")] = None
    num_inference_steps: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None, Meta(description="How many steps to refine it in.")
    ] = None
    width: Annotated[Annotated[int, Meta(ge=1, le=65535)] | None, Meta(description="Pixels; goes with height.")] = None
    height: Annotated[Annotated[int, Meta(ge=1, le=65535)] | None, Meta(description="Pixels; goes with width.")] = None
    sampler: Annotated[
        Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None,
        Meta(description="A sampler of the backend, however spelled; one that it does not have is refused."),
    ] = None
    scheduler: Annotated[
        Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None,
        Meta(description="A noise schedule of the backend (karras, exponential …)."),
    ] = None
    clip_skip: Annotated[int, Meta(ge=1, le=12)] | None = None
    backend: Annotated[
        Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None, Meta(description="Use this backend and no other.")
    ] = None
    strict: Annotated[
        bool | None, Meta(description="Refuse a parameter that the backend cannot honour instead of ignoring it.")
    ] = None
    # names that other servers' clients use for the same things
    steps: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    step: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    sample_steps: Annotated[int, Meta(ge=1, le=1_000_000)] | None = None
    cfg_scale: float | None = None
    cfg: float | None = None
    guidance: float | None = None
    sampler_name: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None
    sample_method: Annotated[str, Meta(max_length=MAX_NAME_CHARS)] | None = None


class ClosedGenerationBody(GenerationBody, kw_only=True, gc=False, forbid_unknown_fields=True):
    """The same without unknown fields: what decodes as this, as nearly all bodies do, need not be searched for any."""


KNOWN_FIELDS = frozenset(GenerationBody.__struct_fields__)


CHOICES: dict[str, tuple[str, ...]] = {
    "quality": ("auto", "low", "medium", "high", "xhigh", "max", "standard", "hd"),
    "style": ("vivid", "natural"),
    "background": ("auto", "transparent", "opaque"),
    "moderation": ("auto", "low"),
    "response_format": ("url", "b64_json", "base64", "file"),
    "output_format": ("png", "jpeg", "jpg", "webp"),
}
"""The words that a field takes, for messages; a test holds them to the types."""


class Image(msgspec.Struct, frozen=True, omit_defaults=True):
    """One picture of a reply: one of `b64_json`, `url` and `file_path` is there."""

    b64_json: str | None = None
    url: str | None = None
    file_path: str | None = None
    seed: int | None = None
    revised_prompt: str | None = None


class ImagesReply(msgspec.Struct, frozen=True):
    """Body of a reply with pictures; size, quality, background and output_format are what was really made."""

    created: int
    data: list[Image]
    size: str
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    background: Literal["transparent", "opaque"]
    output_format: Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the operator allows (see `[limits]` and `[response]`)."""

    max_n: int
    max_pixels: int
    max_steps: int
    max_prompt_chars: int
    default_format: str
    allow_file: bool
    max_upload_bytes: int = 64 * 1024 * 1024
    """Of all the pictures of one request together."""


def to_request(body: GenerationBody, bounds: Bounds, operation: Operation = "generation") -> ImageRequest:
    """Check and normalise. Pictures that it starts from are put in by others (see `edits`).

    Raises:
        InvalidRequest: a value is impossible; `param` names the field as the client spelled it.
    """
    _check_text(body.prompt, "prompt", bounds)
    if not body.prompt.strip() and operation != "variation":
        raise InvalidRequest("prompt is empty", param="prompt")
    if body.negative_prompt is not None:
        _check_text(body.negative_prompt, "negative_prompt", bounds)
    count = body.n if body.n is not None else 1
    if count > bounds.max_n:
        raise InvalidRequest(f"n is {count}; at most {bounds.max_n} are allowed", param="n")
    width, height = _size(body, bounds)
    steps, steps_name = body.num_inference_steps, "num_inference_steps"
    if body.steps is not None or body.step is not None or body.sample_steps is not None:
        aliases = (("steps", body.steps), ("step", body.step), ("sample_steps", body.sample_steps))
        steps, steps_name = one_of(steps_name, steps, aliases)
    if steps is not None and steps > bounds.max_steps:
        raise InvalidRequest(f"{steps_name} is {steps}; at most {bounds.max_steps} are allowed", param=steps_name)
    guidance, guidance_name = body.guidance_scale, "guidance_scale"
    if body.cfg_scale is not None or body.cfg is not None or body.guidance is not None:
        others = (("cfg_scale", body.cfg_scale), ("cfg", body.cfg), ("guidance", body.guidance))
        guidance, guidance_name = one_of(guidance_name, guidance, others)
    if guidance is not None and not 0 <= guidance <= MAX_GUIDANCE:
        raise InvalidRequest(f"{guidance_name} must be from 0 to {MAX_GUIDANCE:g}", param=guidance_name)
    sampler = body.sampler
    if body.sampler_name is not None or body.sample_method is not None:
        names = (("sampler_name", body.sampler_name), ("sample_method", body.sample_method))
        sampler, _ = one_of("sampler", sampler, names)
    seed_given = body.seed is not None and body.seed >= 0
    if body.seed is not None and body.seed >= SEED_LIMIT:
        raise InvalidRequest(f"seed must be below {SEED_LIMIT}", param="seed")
    output_format: OutputFormat | None = "jpeg" if body.output_format == "jpg" else body.output_format
    if body.background == "transparent" and output_format == "jpeg":
        raise InvalidRequest("a JPEG cannot be transparent; use png or webp", param="background")
    return ImageRequest(
        prompt=body.prompt,
        operation=operation,
        model=body.model or None,
        backend=body.backend or None,
        n=count,
        width=width,
        height=height,
        negative_prompt=body.negative_prompt or None,
        # below 2**31: some engines take no more
        seed=body.seed if seed_given and body.seed is not None else int.from_bytes(random_bytes(4), "big") >> 1,
        seed_given=seed_given,
        steps=steps,
        guidance_scale=guidance,
        quality=body.quality,
        style=body.style,
        background=body.background,
        moderation=body.moderation,
        sampler=sampler,
        scheduler=body.scheduler,
        clip_skip=body.clip_skip,
        output_format=output_format,
        output_compression=body.output_compression,
        user=body.user,
        previews=body.partial_images or 0,
        strict=bool(body.strict),
        given=_given(body, width, steps, guidance, sampler, seed_given=seed_given),
    )


_NOTHING: frozenset[str] = frozenset()


def _given(
    body: GenerationBody,
    width: int | None,
    steps: int | None,
    guidance: float | None,
    sampler: str | None,
    *,
    seed_given: bool,
) -> frozenset[str]:
    """The optional parameters that the client set to something else than "auto", by their canonical names."""
    names = [] if width is None else ["size"]
    if seed_given:
        names.append("seed")
    if steps is not None:
        names.append("num_inference_steps")
    if guidance is not None:
        names.append("guidance_scale")
    if sampler is not None:
        names.append("sampler")
    if body.negative_prompt is not None:
        names.append("negative_prompt")
    if body.quality is not None and body.quality != "auto":
        names.append("quality")
    if body.style is not None:
        names.append("style")
    if body.background is not None and body.background != "auto":
        names.append("background")
    if body.moderation is not None and body.moderation != "auto":
        names.append("moderation")
    if body.scheduler is not None:
        names.append("scheduler")
    if body.clip_skip is not None:
        names.append("clip_skip")
    return frozenset(names) if names else _NOTHING


def response_format_of(body: GenerationBody, bounds: Bounds) -> ResponseFormat:
    """What the client asked for; else base64 for the model names whose clients expect it; else the configured default.

    Raises:
        InvalidRequest: `file` where the operator does not allow it.
    """
    asked = body.response_format
    if asked == "file":
        if not bounds.allow_file:
            raise InvalidRequest(
                'response_format "file" is off here; the operator can allow it with response.allow_file',
                param="response_format",
            )
        return "file"
    if asked == "url":
        return "url"
    if asked is not None or (body.model and _INLINE_MODELS.match(body.model)):
        return "b64_json"
    if bounds.default_format == "file" and bounds.allow_file:
        return "file"
    return "b64_json" if bounds.default_format == "b64_json" else "url"


def unknown_fields(raw: bytes, known: frozenset[str] = KNOWN_FIELDS) -> list[str]:
    """The fields of a body, which is known to be good, that nobody here knows: clients send all sorts."""
    try:
        names = _FIELDS.decode(raw).keys()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return []  # names that are no text, or something very deep in what nobody reads
    return [] if names <= known else sorted(names - known)


def with_unknown(request: ImageRequest, names: Iterable[str]) -> ImageRequest:
    """The request, which also gave fields of these names: nobody honours them, and the client is told so."""
    shown = frozenset([name for name in names if _SHOWABLE.fullmatch(name)][:MAX_UNKNOWN])
    return structs.replace(request, given=request.given | shown) if shown else request


def refuse_unknown(names: Iterable[str], known: frozenset[str] = KNOWN_FIELDS) -> None:
    """For `strict`: a field that nobody here knows is refused instead of ignored.

    Raises:
        InvalidRequest: naming the first, and the nearest known one.
    """
    for name in sorted(set(names) - known):
        near = difflib.get_close_matches(name, known, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidRequest(f"unknown field {name[:80]!r}{hint}", code="unknown_parameter", param=name[:80])


def _check_text(text: str, name: str, bounds: Bounds) -> None:
    if len(text) > bounds.max_prompt_chars:
        raise InvalidRequest(
            f"{name} has {len(text)} characters; at most {bounds.max_prompt_chars} are allowed",
            code="string_above_max_length",
            param=name,
        )


def one_of(canonical: str, value: _T | None, aliases: tuple[tuple[str, _T | None], ...]) -> tuple[_T | None, str]:
    """The value under its own name or an alias, and the name that the client used; two that differ are refused."""
    used = canonical
    for alias, other in aliases:
        if other is None:
            continue
        if value is not None and other != value:
            raise InvalidRequest(f"{used} and {alias} mean the same and differ ({value}, {other})", param=alias)
        value, used = other, alias
    return value, used


def _size(body: GenerationBody, bounds: Bounds) -> tuple[int | None, int | None]:
    width, height, param = body.width, body.height, "width"
    if (width is None) != (height is None):
        missing = "height" if height is None else "width"
        raise InvalidRequest(f"width and height go together; {missing} is missing", param=missing)
    if body.size and body.size != "auto":
        match = _SIZE.fullmatch(body.size)
        if match is None:
            shown = body.size[:40]
            raise InvalidRequest(
                f'size must be "auto" or WIDTHxHEIGHT such as "1024x1024", not {shown!r}', param="size"
            )
        wide, high = int(match.group(1)), int(match.group(2))
        if max(wide, high) > 65535:
            raise InvalidRequest(
                f"a side of {max(wide, high)} pixels is more than any picture has (65535)", param="size"
            )
        if width is not None and (width, height) != (wide, high):
            raise InvalidRequest(f"size is {wide}x{high}, but width and height say {width}x{height}", param="size")
        width, height, param = wide, high, "size"
    if width is not None and height is not None and width * height > bounds.max_pixels:
        raise InvalidRequest(
            f"{width}x{height} has {width * height} pixels; at most {bounds.max_pixels} are allowed", param=param
        )
    return width, height
