"""Reading JSON bodies: media type, size, shape, with the field at fault in the error."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from img_serving.api.exchange import Exchange
from img_serving.domain.errors import InvalidRequest, UnsupportedMediaType
from img_serving.domain.wording import in_words

Body = TypeVar("Body")

_FIELD = re.compile(r" - at `\$\.?([^`]*)`$")
Choices = Mapping[str, Sequence[str]]

_UNKNOWN = re.compile(r"Object contains unknown field `([^`]{1,80})`")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


async def read_json(
    exchange: Exchange, decoder: msgspec.json.Decoder[Body], limit: int, choices: Choices | None = None
) -> tuple[Body, bytes]:
    """The decoded body and its bytes.

    Raises:
        UnsupportedMediaType: it says that it is something else than JSON.
        PayloadTooLarge: it is over `limit` bytes.
        InvalidRequest: it is not JSON, or of the wrong shape; `param` names the field.
    """
    raw = await read_raw(exchange, limit)
    return decode_json(raw, decoder, choices), raw


async def read_raw(exchange: Exchange, limit: int) -> bytes:
    """The bytes of a body that says it is JSON. Raises as `read_json` does, but for what is in them."""
    check_json_type(exchange)
    raw = exchange.body_at_hand(limit)
    return await exchange.body(limit) if raw is None else raw


def check_json_type(exchange: Exchange) -> None:
    """Refuse a body that says it is something else. Raises UnsupportedMediaType."""
    check_json(exchange.header(b"content-type"))


def check_json(media_type: bytes | None) -> None:
    """The same for a Content-Type header. Raises UnsupportedMediaType."""
    if media_type is not None and media_type != b"application/json":
        kind = media_type.partition(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            shown = kind.decode("latin-1")[:80]
            raise UnsupportedMediaType(f"this route reads application/json, not {shown!r}; set the Content-Type header")


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[Body], choices: Choices | None = None) -> Body:
    """Decode and validate; see `read_json` for what is raised."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(error, choices) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = "the body is empty" if not raw.strip() else f"the body is not valid JSON: {error}"
        raise InvalidRequest(text, code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def invalid(error: msgspec.ValidationError, choices: Choices | None = None) -> InvalidRequest:
    """A validation error with its field in `param`: `$.n` becomes `n`. `choices` are the words that a field takes."""
    text = str(error)
    missing = _MISSING.match(text)
    field = _FIELD.search(text)
    path = field.group(1) if field else ""
    if missing:
        param = f"{path}.{missing.group(1)}".lstrip(".")
        return InvalidRequest(f"{param} is required", code="missing_required_parameter", param=param)
    reason = _FIELD.sub("", text)
    if unknown := _UNKNOWN.match(reason):
        name = f"{path}.{unknown.group(1)}".lstrip(".")
        return InvalidRequest(f"unknown field {name!r}", code="unknown_parameter", param=name)
    if not path:
        return InvalidRequest(f"the body must be a JSON object: {reason}", code="invalid_type")
    code = "invalid_type" if ", got `" in reason else "invalid_value"
    told = in_words(reason, () if choices is None else choices.get(path, ()))
    return InvalidRequest(f"{path}: {told}", code=code, param=path)
