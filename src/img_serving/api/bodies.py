"""Reading JSON bodies: media type, size, shape, with the field at fault in the error."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from img_serving.api.exchange import Exchange
from img_serving.domain.errors import InvalidRequest, UnsupportedMediaType

Body = TypeVar("Body")

_FIELD = re.compile(r" - at `\$\.?([^`]*)`$")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")


async def read_json(exchange: Exchange, decoder: msgspec.json.Decoder[Body], limit: int) -> tuple[Body, bytes]:
    """The decoded body and its bytes.

    Raises:
        UnsupportedMediaType: it says that it is something else than JSON.
        PayloadTooLarge: it is over `limit` bytes.
        InvalidRequest: it is not JSON, or of the wrong shape; `param` names the field.
    """
    media_type = exchange.header(b"content-type")
    if media_type is not None and media_type != b"application/json":
        kind = media_type.partition(b";")[0].strip().lower()
        if kind != b"application/json" and not kind.endswith(b"+json"):
            shown = kind.decode("latin-1")[:80]
            raise UnsupportedMediaType(f"this route reads application/json, not {shown!r}; set the Content-Type header")
    raw = exchange.body_at_hand(limit)
    if raw is None:
        raw = await exchange.body(limit)
    return decode_json(raw, decoder), raw


def decode_json(raw: bytes, decoder: msgspec.json.Decoder[Body]) -> Body:
    """Decode and validate; see `read_json` for what is raised."""
    try:
        return decoder.decode(raw)
    except msgspec.ValidationError as error:
        raise invalid(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        text = "the body is empty" if not raw.strip() else f"the body is not valid JSON: {error}"
        raise InvalidRequest(text, code="invalid_json") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply", code="invalid_json") from None


def invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """A validation error with its field in `param`: `$.n` becomes `n`."""
    text = str(error)
    missing = _MISSING.match(text)
    field = _FIELD.search(text)
    path = field.group(1) if field else ""
    if missing:
        param = f"{path}.{missing.group(1)}".lstrip(".")
        return InvalidRequest(f"{param} is required", code="missing_required_parameter", param=param)
    reason = _FIELD.sub("", text)
    if not path:
        return InvalidRequest(f"the body must be a JSON object: {reason}", code="invalid_type")
    code = "invalid_type" if re.match(r"Expected `[a-z| ]+`, got", reason) else "invalid_value"
    return InvalidRequest(f"{path}: {reason[0].lower()}{reason[1:]}", code=code, param=path)
