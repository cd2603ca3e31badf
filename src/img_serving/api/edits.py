"""The bodies of edits and variations, as forms or as JSON, and how they become an `ImageRequest`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, structs

from img_serving.api.bodies import invalid
from img_serving.api.generation import CHOICES, Bounds, GenerationBody, one_of, to_request
from img_serving.api.multipart import Form
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import ImageRequest, InputImage
from img_serving.media.payload import decoded_base64

MAX_IMAGES = 16
MAX_URL_CHARS = 8192

PicturesOperation = Literal["edit", "variation"]


class ImageReference(msgspec.Struct, forbid_unknown_fields=True):
    """A picture in a JSON body: a `data:` URL in `image_url`, or an http(s) one where the operator lets them be fetched."""

    image_url: str | None = None
    file_id: str | None = None


class PicturesBody(GenerationBody, kw_only=True, gc=False):
    """What edits and variations share: a generation, and the pictures that it starts from."""

    images: Annotated[
        Annotated[list[ImageReference], Meta(min_length=1, max_length=MAX_IMAGES)] | None,
        Meta(description="The pictures, as data URLs; as http(s) URLs where `limits.fetch_image_urls` is on."),
    ] = None
    image: Annotated[
        str | list[str] | None, Meta(description="The same, as a data URL, an http(s) URL or base64, or a list.")
    ] = None
    strength: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="How much may change: 0 nothing, 1 everything.")
    ] = None
    denoising_strength: Annotated[float, Meta(ge=0, le=1)] | None = None
    denoise: Annotated[float, Meta(ge=0, le=1)] | None = None


class EditBody(PicturesBody, kw_only=True, gc=False):
    """Body of `POST /v1/images/edits` as JSON: that of a generation, and the pictures that it starts from."""

    mask: Annotated[
        ImageReference | str | None,
        Meta(description="Where to paint: transparent in a picture of the first one's size."),
    ] = None


class VariationBody(PicturesBody, kw_only=True, gc=False):
    """Body of `POST /v1/images/variations` as JSON: one picture, and no words."""

    prompt: Annotated[str, Meta(description="Ignored: a variation has no words; an edit has.")] = ""


BODIES: dict[PicturesOperation, type[PicturesBody]] = {"edit": EditBody, "variation": VariationBody}
FIELDS = {operation: frozenset(body.__struct_fields__) for operation, body in BODIES.items()}
PICTURES = ("images", "image", "mask")
_FILES: dict[PicturesOperation, frozenset[str]] = {
    "edit": frozenset({"image", "image[]", "images", "images[]", "mask", "mask[]"}),
    "variation": frozenset({"image", "image[]", "images", "images[]"}),
}
_TAKES: dict[PicturesOperation, str] = {"edit": "an edit takes image and mask", "variation": "a variation takes image"}


@dataclass(frozen=True, slots=True)
class Named:
    """A picture that is only named: an http(s) URL."""

    url: str


Given = bytes | Named
"""A picture as it came."""


@dataclass(frozen=True, slots=True)
class Pictures:
    """The pictures of a request as they came: what it starts from in its order, and the mask."""

    images: tuple[Given, ...]
    mask: Given | None


def body_of_form(form: Form, operation: PicturesOperation = "edit") -> tuple[PicturesBody, Pictures]:
    """The fields of a form as a body, and its pictures. Fields that nobody knows are left out.

    Raises:
        InvalidRequest: a value is impossible, or there are several masks.
    """
    known = {name: text for name, text in form.fields.items() if name in FIELDS[operation]}
    for name in PICTURES:
        if known.pop(name, None) is not None:
            raise InvalidRequest(f"{name} must be a file of the form", param=name)
    if operation == "edit" and "prompt" not in known:
        raise InvalidRequest("prompt is required", code="missing_required_parameter", param="prompt")
    try:
        body = msgspec.convert(known, BODIES[operation], strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error, CHOICES) from None
    for name in form.files:
        if name not in _FILES[operation]:
            raise InvalidRequest(f"the form has a file {name[:80]!r}; {_TAKES[operation]}", param=name[:80])
    # the parts of one name keep their order; the order of names, which some clients shuffle, says nothing
    images = [data for name in sorted(form.files) if name.startswith("image") for data in form.files[name]]
    masks = [data for name in sorted(form.files) if name.startswith("mask") for data in form.files[name]]
    if len(masks) > 1:
        raise InvalidRequest("an edit takes one mask", param="mask")
    return body, Pictures(tuple(images), masks[0] if masks else None)


def pictures_of(body: PicturesBody) -> Pictures:
    """The pictures and the mask of a JSON body: decoded, or named by their URLs.

    Raises:
        InvalidRequest: one is no data URL, not base64, or no URL that could be fetched.
    """
    if body.images is not None and body.image is not None:
        raise InvalidRequest("images and image mean the same: send one of them", param="image")
    given: list[Any] = body.images or ([body.image] if isinstance(body.image, str) else body.image or [])
    if len(given) > MAX_IMAGES:
        raise _too_many(len(given))
    mask = body.mask if isinstance(body, EditBody) else None
    return Pictures(tuple(_given(one, "image") for one in given), None if mask is None else _given(mask, "mask"))


def to_edit(
    body: PicturesBody,
    images: tuple[InputImage, ...],
    mask: InputImage | None,
    bounds: Bounds,
    operation: PicturesOperation = "edit",
) -> ImageRequest:
    """Check and normalise; see `generation.to_request`.

    Raises:
        InvalidRequest: a value is impossible; `param` names the field as the client spelled it.
    """
    request = to_request(body, bounds, operation)
    first = images[0]
    if mask is not None and (mask.width, mask.height) != (first.width, first.height):
        raise InvalidRequest(
            f"the mask is {mask.width}x{mask.height}, the first image {first.width}x{first.height}: they must be alike",
            param="mask",
        )
    aliases = (("denoising_strength", body.denoising_strength), ("denoise", body.denoise))
    strength, _ = one_of("strength", body.strength, aliases)
    given = request.given | {"strength"} if strength is not None else request.given
    prompt = request.prompt if operation == "edit" else ""
    return structs.replace(request, prompt=prompt, images=images, mask=mask, strength=strength, given=given)


def check_count(count: int, operation: PicturesOperation) -> None:
    """Whether there are as many pictures as this starts from.

    Raises:
        InvalidRequest: there is none, or there are too many.
    """
    if not count:
        raise InvalidRequest("image is required", code="missing_required_parameter", param="image")
    if operation == "variation" and count > 1:
        raise InvalidRequest(f"a variation starts from one picture, not {count}", param="image")
    if count > MAX_IMAGES:
        raise _too_many(count)


def _too_many(count: int) -> InvalidRequest:
    return InvalidRequest(f"an edit takes at most {MAX_IMAGES} pictures, not {count}", param="image")


def _given(reference: ImageReference | str, param: str) -> Given:
    if isinstance(reference, ImageReference):
        if reference.file_id is not None or reference.image_url is None:
            raise InvalidRequest(
                "there are no stored files here: send the picture as a data URL in image_url", param=param
            )
        reference = reference.image_url
    if reference[:8].lower().startswith(("http://", "https://")):
        if len(reference) > MAX_URL_CHARS:
            raise InvalidRequest(f"a URL may have at most {MAX_URL_CHARS} characters", param=param)
        return Named(reference)
    try:
        return decoded_base64(reference)
    except ValueError as error:
        raise InvalidRequest(str(error), param=param) from None
