"""What A1111's clients send and read, and how it is said in our own words and back. No I/O: `a1111_facade` has the routes."""

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Iterable, Sequence
from math import isfinite
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from img_serving.api.errors import error_detail, reply_to
from img_serving.api.exchange import Reply
from img_serving.domain.errors import GatewayError, InvalidRequest
from img_serving.domain.images import ImageRequest

PREFIX = "/sdapi/"

AUTOMATIC = "Automatic"
"""The sampler or schedule that the backend chooses itself; first in the lists, for clients that take the first there is."""

_LEFT_TO_US = frozenset({"", "automatic", "default", "n/a", "none", "use same sampler", "use same scheduler"})
"""What clients send where nobody has chosen a sampler, a schedule or a checkpoint, in lower case."""

_NOT_HONOURED = (
    "alwayson_scripts",
    "enable_hr",
    "refiner_checkpoint",
    "restore_faces",
    "script_name",
    "styles",
    "subseed_strength",
    "tiling",
)
"""What changes the picture where it is set, and is not done here: the reply's `x-img-serving-ignored` names it."""

Count = Annotated[int, Meta(ge=1, le=1_000_000)]


class OverrideSettings(msgspec.Struct, kw_only=True):
    """Settings for one request."""

    sd_model_checkpoint: str | None = None
    CLIP_stop_at_last_layers: int | None = None


class TextToImage(msgspec.Struct, kw_only=True):
    """Body of `POST /sdapi/v1/txt2img`, as far as it is read. `model` is stable-diffusion.cpp's, `sampler_index` older."""

    prompt: str = ""
    negative_prompt: str | None = None
    model: str | None = None
    override_settings: OverrideSettings | None = None
    seed: int | None = None
    steps: int | None = None
    cfg_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: Count | None = None
    n_iter: Count | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    clip_skip: int | None = None


class Options(msgspec.Struct, kw_only=True):
    """Body of `POST /sdapi/v1/options`: only the checkpoint can be set; others echo all that they have read."""

    sd_model_checkpoint: str | msgspec.UnsetType | None = msgspec.UNSET


class Drawn(msgspec.Struct):
    """Of the reply to an OpenAI request: what is told on."""

    data: list[DrawnPicture]
    size: str


class DrawnPicture(msgspec.Struct):
    """One picture of it: the number of its text among the texts that were taken out."""

    b64_json: str
    seed: int | None = None


_DRAWN = msgspec.json.Decoder(Drawn)
_FIELDS = msgspec.json.Decoder(dict[str, Any])


def is_a1111(path: str) -> bool:
    """Whether a path is of this API, with `/v1` before it or not."""
    return path.startswith((PREFIX, "/v1" + PREFIX))


def key_of_basic(authorization: bytes) -> bytes:
    """The key in `Authorization: Basic …`: the password, or the name where there is no password; else b""."""
    if authorization[:6].lower() != b"basic ":
        return b""
    try:
        name, _, password = b64decode(authorization[6:].strip(), validate=True).partition(b":")
    except binascii.Error:
        return b""
    return password or name


def a1111_reply_to(error: GatewayError) -> Reply:
    """The reply that tells a client of `error`: our status and headers, A1111's body."""
    told = reply_to(error)
    message = error_detail(error).message
    body = {"error": error.code or error.kind, "detail": message, "body": "", "errors": message}
    return Reply(told.status, (msgspec.json.encode(body),), headers=told.headers)


def to_generation(body: TextToImage, raw: bytes, selected: str | None) -> bytes:
    """The same request as a body of `POST /v1/images/generations`; `selected` is the model where it names none.

    Raises:
        InvalidRequest: it asks for more pictures than can be counted, or has a number that is none.
    """
    if body.cfg_scale is not None and not isfinite(body.cfg_scale):
        raise InvalidRequest("cfg_scale must be a number", param="cfg_scale")
    settings = body.override_settings or OverrideSettings()
    count = (body.batch_size or 1) * (body.n_iter or 1)
    clip_skip = settings.CLIP_stop_at_last_layers if body.clip_skip is None else body.clip_skip
    if count > 1_000_000:
        raise InvalidRequest(f"batch_size times n_iter is {count}", param="batch_size")
    fields = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt or None,
        "model": chosen(settings.sd_model_checkpoint) or chosen(body.model) or selected,
        "n": count,
        # -1 asks for any, and some clients send what is below it
        "seed": body.seed if body.seed is not None and body.seed >= 0 else None,
        "steps": body.steps,
        "cfg_scale": body.cfg_scale,
        "width": body.width,
        "height": body.height,
        "sampler_name": chosen(body.sampler_name) or chosen(body.sampler_index),
        "scheduler": chosen(body.scheduler),
        "clip_skip": clip_skip if clip_skip is not None and clip_skip > 1 else None,  # 1 is what is done anyway
        "response_format": "b64_json",
        "output_format": "png",
        **dict.fromkeys(_set_in(raw), True),
    }
    return msgspec.json.encode({name: value for name, value in fields.items() if value is not None})


def told_of(parts: Iterable[bytes | memoryview], request: ImageRequest, model: str) -> tuple[bytes | memoryview, ...]:
    """The body of a reply with pictures, made of that to the OpenAI request; `model` is a name for people.

    Pictures are parts of their own in it, and go on as they are: to parse or to copy megabytes would hold the event loop.
    """
    texts: list[bytes | memoryview] = []
    frame = bytearray()
    for part in parts:
        if part[:1] in (b"{", b'"'):
            frame += part
        else:  # no base64 begins like JSON
            frame += b"%d" % len(texts)
            texts.append(part)
    drawn = _DRAWN.decode(frame)
    width, _, height = drawn.size.partition("x")
    pieces: list[bytes | memoryview] = [b'{"images":[']
    for index, picture in enumerate(drawn.data):
        pieces += [b',"' if index else b'"', texts[int(picture.b64_json)], b'"']
    parameters, info = _about(drawn.data, request, (int(width), int(height)), model)
    pieces += [
        b'],"parameters":',
        msgspec.json.encode(parameters),
        b',"info":',
        msgspec.json.encode(msgspec.json.encode(info).decode()),  # JSON inside a JSON string
        b"}",
    ]
    return tuple(pieces)


def _about(
    drawn: Sequence[DrawnPicture], request: ImageRequest, size: tuple[int, int], model: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`parameters` and `info`: what was asked for, and what was made."""
    count, negative = len(drawn), request.negative_prompt or ""
    seeds = [request.seed_of(index) if one.seed is None else one.seed for index, one in enumerate(drawn)]
    parameters = {
        "prompt": request.prompt,
        "negative_prompt": negative,
        "seed": seeds[0],
        "steps": request.steps,
        "cfg_scale": request.guidance_scale,
        "width": size[0],
        "height": size[1],
        "sampler_name": request.sampler,
        "scheduler": request.scheduler,
        "batch_size": count,
        "n_iter": 1,
    }
    info = {
        **parameters,
        "all_prompts": [request.prompt] * count,
        "all_negative_prompts": [negative] * count,
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * count,
        "subseed_strength": 0,
        "restore_faces": False,
        "sd_model_name": model,
        "index_of_first_image": 0,
        "infotexts": [_infotext(request, seed, size, model) for seed in seeds],
        "styles": [],
        "extra_generation_params": {},
    }
    return parameters, info


def _infotext(request: ImageRequest, seed: int, size: tuple[int, int], model: str) -> str:
    """The text that A1111 writes beside a picture: the words, and in the last line what it was made with."""
    facts = {
        "Steps": request.steps,
        "Sampler": request.sampler,
        "Schedule type": request.scheduler,
        "CFG scale": request.guidance_scale,
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
    }
    lines = [request.prompt]
    if request.negative_prompt:
        lines.append(f"Negative prompt: {request.negative_prompt}")
    lines.append(", ".join(f"{name}: {value}" for name, value in facts.items() if value is not None))
    return "\n".join(lines)


def chosen(name: str | None) -> str | None:
    """A name that somebody chose, else None."""
    return None if name is None or name.strip().lower() in _LEFT_TO_US else name


def _set_in(raw: bytes) -> list[str]:
    """What is set in a body, which is known to be good, and would change the picture if it were done here."""
    try:
        fields = _FIELDS.decode(raw)
    except (ValueError, RecursionError):
        return []  # something very deep in what nobody reads
    return [name for name in _NOT_HONOURED if fields.get(name)]
