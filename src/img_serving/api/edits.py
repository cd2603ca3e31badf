"""The body of an image edit, as a form or as JSON, and how it becomes an `ImageRequest`."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta, structs

from img_serving.api.bodies import invalid
from img_serving.api.generation import CHOICES, Bounds, GenerationBody, one_of, to_request
from img_serving.api.multipart import Form
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import ImageRequest, InputImage
from img_serving.media.payload import artifact_from_base64, raw_bytes
from img_serving.media.sniff import check_picture

MAX_IMAGES = 16


class ImageReference(msgspec.Struct, forbid_unknown_fields=True):
    """A picture in a JSON body: a `data:` URL in `image_url`."""

    image_url: str | None = None
    file_id: str | None = None


class EditBody(GenerationBody, kw_only=True, gc=False):
    """Body of `POST /v1/images/edits` as JSON: that of a generation, and the pictures that it starts from."""

    images: Annotated[
        Annotated[list[ImageReference], Meta(min_length=1, max_length=MAX_IMAGES)] | None,
        Meta(description="The pictures, as data URLs."),
    ] = None
    image: Annotated[str | list[str] | None, Meta(description="The same, as a data URL or base64, or a list.")] = None
    mask: Annotated[
        ImageReference | str | None,
        Meta(description="Where to paint: transparent in a picture of the first one's size."),
    ] = None
    strength: Annotated[
        Annotated[float, Meta(ge=0, le=1)] | None, Meta(description="How much may change: 0 nothing, 1 everything.")
    ] = None
    denoising_strength: Annotated[float, Meta(ge=0, le=1)] | None = None
    denoise: Annotated[float, Meta(ge=0, le=1)] | None = None


_FILE_FIELDS = frozenset({"image", "image[]", "images", "images[]", "mask", "mask[]"})


def body_of_form(form: Form) -> tuple[EditBody, list[bytes], bytes | None]:
    """The fields of a form as a body, its pictures and its mask. Fields that nobody knows are left out.

    Raises:
        InvalidRequest: a value is impossible, or there are several masks.
    """
    known = {name: text for name, text in form.fields.items() if name in EditBody.__struct_fields__}
    for name in ("images", "image", "mask"):
        if known.pop(name, None) is not None:
            raise InvalidRequest(f"{name} must be a file of the form", param=name)
    if "prompt" not in known:
        raise InvalidRequest("prompt is required", code="missing_required_parameter", param="prompt")
    try:
        body = msgspec.convert(known, EditBody, strict=False)
    except msgspec.ValidationError as error:
        raise invalid(error, CHOICES) from None
    pictures = [data for name, files in form.files.items() if name.startswith("image") for data in files]
    masks = [data for name, files in form.files.items() if name.startswith("mask") for data in files]
    for name in form.files:
        if name not in _FILE_FIELDS:
            raise InvalidRequest(f"the form has a file {name[:80]!r}; an edit takes image and mask", param=name[:80])
    if len(masks) > 1:
        raise InvalidRequest("an edit takes one mask", param="mask")
    return body, pictures, masks[0] if masks else None


def pictures_of(body: EditBody) -> tuple[list[bytes], bytes | None]:
    """The pictures and the mask of a JSON body.

    Raises:
        InvalidRequest: one is no data URL, or not base64.
    """
    if body.images is not None and body.image is not None:
        raise InvalidRequest("images and image mean the same: send one of them", param="image")
    given: list[Any] = body.images or ([body.image] if isinstance(body.image, str) else body.image or [])
    return [_decoded(one, "image") for one in given], None if body.mask is None else _decoded(body.mask, "mask")


def to_edit(body: EditBody, pictures: list[bytes], mask: bytes | None, bounds: Bounds) -> ImageRequest:
    """Check and normalise; see `generation.to_request`.

    Raises:
        InvalidRequest: a value is impossible; `param` names the field as the client spelled it.
    """
    request = to_request(body, bounds)
    if not pictures:
        raise InvalidRequest("image is required", code="missing_required_parameter", param="image")
    if len(pictures) > MAX_IMAGES:
        raise InvalidRequest(f"an edit takes at most {MAX_IMAGES} pictures, not {len(pictures)}", param="image")
    images = tuple(_input(data, "image", bounds) for data in pictures)
    area = None if mask is None else _input(mask, "mask", bounds)
    first = images[0]
    if area is not None and (area.width, area.height) != (first.width, first.height):
        raise InvalidRequest(
            f"the mask is {area.width}x{area.height}, the first image {first.width}x{first.height}: they must be alike",
            param="mask",
        )
    aliases = (("denoising_strength", body.denoising_strength), ("denoise", body.denoise))
    strength, _ = one_of("strength", body.strength, aliases)
    given = request.given | {"strength"} if strength is not None else request.given
    return structs.replace(request, operation="edit", images=images, mask=area, strength=strength, given=given)


def _decoded(reference: ImageReference | str, param: str) -> bytes:
    if isinstance(reference, ImageReference):
        if reference.file_id is not None or reference.image_url is None:
            raise InvalidRequest(
                "there are no stored files here: send the picture as a data URL in image_url", param=param
            )
        reference = reference.image_url
    if reference[:5].lower() in {"http:", "https"}:
        raise InvalidRequest(
            "pictures are not fetched from URLs: send a data URL (data:image/png;base64,…)", param=param
        )
    try:
        return raw_bytes(artifact_from_base64(reference))
    except ValueError as error:
        raise InvalidRequest(str(error), param=param) from None


def _input(data: bytes, param: str, bounds: Bounds) -> InputImage:
    """What is really in it, whatever its name and type say."""
    try:
        media_type, width, height = check_picture(data)
    except ValueError as error:
        raise InvalidRequest(str(error), param=param) from None
    if width * height > bounds.max_pixels:
        raise InvalidRequest(
            f"the {param} is {width}x{height}, {width * height} pixels; at most {bounds.max_pixels} are allowed",
            param=param,
        )
    return InputImage(data, media_type, width, height)
