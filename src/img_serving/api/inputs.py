"""Reading a request that starts from pictures: its body, the pictures behind URLs, and what is let in of them.

One function for every way in: forms and JSON, the routes and the jobs. What takes long runs in a thread, for a body of many
megabytes must not hold everybody else up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec
from msgspec import structs

from img_serving.api.bodies import check_json, decode_json
from img_serving.api.edits import (
    BODIES,
    FIELDS,
    PICTURES,
    EditBody,
    Given,
    Named,
    Pictures,
    PicturesBody,
    PicturesOperation,
    body_of_form,
    check_count,
    pictures_of,
    to_edit,
)
from img_serving.api.fingerprints import fingerprint_of_pictures
from img_serving.api.generation import (
    CHOICES,
    Bounds,
    GenerationBody,
    refuse_unknown,
    response_format_of,
    to_request,
    unknown_fields,
    with_unknown,
)
from img_serving.api.multipart import read_form
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import ImageRequest, InputImage
from img_serving.domain.stored import ResponseFormat
from img_serving.media.intake import take_in
from img_serving.media.masks import with_alpha
from img_serving.transport.fetch import FetchFailed, SafeFetcher, UrlFetcher
from img_serving.transport.proxy import proxy_from_environment

MAX_IMAGE_BYTES = 50 * 1024 * 1024
"""Of one picture."""

FETCH_SECONDS = 20.0
"""Of one picture behind a URL, redirects included."""

FETCHES_AT_ONCE = 4
"""Of one request."""

_DECODERS = {operation: msgspec.json.Decoder(body) for operation, body in BODIES.items()}


@dataclass(frozen=True, slots=True)
class PicturesRequest:
    """An edit or a variation, read and checked.

    Attributes:
        request: with its pictures; unknown fields are in `given`.
        body: what the client wrote, for what is not the picture's: `stream`, `response_format` …
        response_format: how the pictures come back.
        fingerprint: 32 bytes, equal for equal requests (see `fingerprints`).
    """

    request: ImageRequest
    body: GenerationBody
    response_format: ResponseFormat
    fingerprint: bytes


@dataclass(frozen=True, slots=True)
class _Read:
    """A body that is decoded, and whose pictures have not been looked at."""

    body: PicturesBody
    pictures: Pictures
    unknown: tuple[str, ...]
    fingerprint: bytes


def is_form(content_type: bytes | None) -> bool:
    """Whether a body says that it is a form; else it is read as JSON."""
    return (content_type or b"").partition(b";")[0].strip().lower() == b"multipart/form-data"


def url_fetcher(*, allowed: bool) -> UrlFetcher | None:
    """What gets pictures from URLs of clients: from public addresses only. None where the operator does not allow any."""
    return SafeFetcher(proxy_of=proxy_from_environment) if allowed else None


async def read_pictures_request(
    operation: PicturesOperation,
    raw: bytes,
    content_type: bytes | None,
    bounds: Bounds,
    fetch: UrlFetcher | None,
    *,
    hold: Callable[[int], None] = lambda _: None,
) -> PicturesRequest:
    """Read, fetch and check all that an edit or a variation is made of.

    Args:
        operation: which of the two it is.
        raw: the whole body.
        content_type: the header: a form, or JSON where it is none or not said.
        bounds: what the operator allows.
        fetch: gets pictures behind URLs; None refuses them.
        hold: told how many bytes were fetched, beside those of the body; what it raises ends it.

    Raises:
        UnsupportedMediaType: it is neither a form nor JSON.
        InvalidRequest: what is wrong; `param` names the field as the client spelled it.
    """
    if not is_form(content_type):
        check_json(content_type)
    read = await asyncio.to_thread(_read, operation, raw, content_type, bounds)
    pictures = read.pictures
    if any(isinstance(one, Named) for one in (*pictures.images, pictures.mask)):
        pictures = await _fetched(pictures, fetch, bounds, hold)
    return await asyncio.to_thread(_checked, operation, read, pictures, bounds)


def _read(operation: PicturesOperation, raw: bytes, content_type: bytes | None, bounds: Bounds) -> _Read:
    """Decode, and check all that can be without a picture. Raises InvalidRequest."""
    fields = FIELDS[operation]
    if is_form(content_type):
        form = read_form(raw, content_type or b"")
        body, pictures = body_of_form(form, operation)
        unknown = sorted(form.fields.keys() - fields)
        said: bytes = msgspec.json.encode(form.fields, order="sorted")
    else:
        body = decode_json(raw, _DECODERS[operation], CHOICES)
        pictures = pictures_of(body)
        unknown = unknown_fields(raw, fields)
        said = _without_pictures(raw)
    if operation == "variation" and body.prompt:
        unknown.append("prompt")  # it has no words
    if unknown and body.strict:
        refuse_unknown(unknown, fields - {"prompt"} if operation == "variation" else fields)
    to_request(body, bounds, operation)  # what is wrong here is told before anything is fetched
    check_count(len(pictures.images), operation)
    mask = None if pictures.mask is None else _identity(pictures.mask)
    fingerprint = fingerprint_of_pictures(operation, said, [_identity(one) for one in pictures.images], mask)
    return _Read(body, pictures, tuple(unknown), fingerprint)


_RAW_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _without_pictures(raw: bytes) -> bytes:
    """A JSON body, which is known to be good, without its pictures: those have digests of their own."""
    try:
        fields = _RAW_FIELDS.decode(raw)
        rest = {name: msgspec.json.decode(one) for name, one in fields.items() if name not in PICTURES}
        return msgspec.json.encode(rest, order="sorted")
    except (ValueError, RecursionError):
        return raw  # something very deep in what nobody reads


def _identity(picture: Given) -> bytes:
    """What tells a picture from others: its bytes, or the URL that it is named by."""
    return b"url\0" + picture.url.encode("utf-8", "surrogatepass") if isinstance(picture, Named) else picture


async def _fetched(
    pictures: Pictures, fetch: UrlFetcher | None, bounds: Bounds, hold: Callable[[int], None]
) -> Pictures:
    """The same with the bytes of what was only named. Raises InvalidRequest."""
    if fetch is None:
        param = "mask" if not any(isinstance(one, Named) for one in pictures.images) else "image"
        raise InvalidRequest(
            "pictures are not fetched from URLs here: send a data URL (data:image/png;base64,…), or ask the operator for "
            "limits.fetch_image_urls",
            code="unsupported",
            param=param,
        )
    left = bounds.max_upload_bytes
    turns = asyncio.Semaphore(FETCHES_AT_ONCE)

    async def get(picture: Given, field: str, param: str) -> bytes:
        nonlocal left
        if not isinstance(picture, Named):
            return picture
        async with turns:
            try:
                data = await fetch(picture.url, FETCH_SECONDS, max(1, min(MAX_IMAGE_BYTES, left)))
            except FetchFailed as error:
                raise InvalidRequest(
                    f"{field} could not be fetched: {error.message}", code="invalid_image_url", param=param
                ) from None
        hold(len(data))
        left -= len(data)
        if left < 0:
            raise InvalidRequest(
                f"{field}: the pictures are over {bounds.max_upload_bytes} bytes together",
                code="invalid_image_url",
                param=param,
            )
        return data

    try:
        async with asyncio.TaskGroup() as tasks:
            images = [
                tasks.create_task(get(one, f"picture {number}", "image"))
                for number, one in enumerate(pictures.images, start=1)
            ]
            mask = tasks.create_task(get(pictures.mask, "the mask", "mask")) if pictures.mask is not None else None
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # it has stopped the others: none of them is wanted any more
    return Pictures(tuple(one.result() for one in images), None if mask is None else mask.result())


def _checked(operation: PicturesOperation, read: _Read, pictures: Pictures, bounds: Bounds) -> PicturesRequest:
    """Let the pictures in, and make the request. Raises InvalidRequest."""
    take = partial(_taken_in, bounds=bounds)
    images = tuple(
        take(one, "image", f"picture {number}" if len(pictures.images) > 1 else "the image")
        for number, one in enumerate(pictures.images, start=1)
    )
    mask = None if pictures.mask is None else _with_alpha(take(pictures.mask, "mask", "the mask"))
    request = to_edit(read.body, images, mask, bounds, operation)
    if read.unknown:
        request = with_unknown(request, read.unknown)
    body = structs.replace(read.body, images=None, image=None)  # not held a second time for as long as the job lives
    if isinstance(body, EditBody):
        body = structs.replace(body, mask=None)
    return PicturesRequest(request, body, response_format_of(body, bounds), read.fingerprint)


def _taken_in(picture: Given, param: str, name: str, *, bounds: Bounds) -> InputImage:
    assert isinstance(picture, bytes)  # noqa: S101 - all that was named has been fetched
    try:
        return take_in(picture, max_pixels=bounds.max_pixels, max_bytes=MAX_IMAGE_BYTES)
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}", param=param) from None


def _with_alpha(mask: InputImage) -> InputImage:
    """A mask in OpenAI's way, which everybody behind here expects: black and white ones are what other clients paint with."""
    try:
        data = with_alpha(mask.data)
    except ValueError as error:
        raise InvalidRequest(str(error), param="mask") from None
    return mask if data is mask.data else InputImage(data, "image/png", mask.width, mask.height)
