"""What a client asks of an image route, read and checked: the picture, and how it wants its answer."""

from __future__ import annotations

import re
from collections.abc import Callable

import msgspec
from msgspec import structs

from img_serving.api.exchange import Exchange
from img_serving.api.generation import GenerationBody
from img_serving.domain.errors import InvalidRequest
from img_serving.domain.images import ImageRequest
from img_serving.domain.stored import ResponseFormat

MAX_KEY_CHARS = 255
_KEY = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_RESPOND_ASYNC = re.compile(rb"(?:^|,)\s*respond-async\s*(?:;|,|$)", re.IGNORECASE)

TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}(-[!-~]{0,256})?")
"""W3C Trace Context, 3.2: what is passed on."""


class Asked(msgspec.Struct, frozen=True):
    """A request, and how it is to be answered. `fingerprint` is only taken where somebody wants to know it."""

    request: ImageRequest
    response_format: ResponseFormat
    stream: bool
    cancel_on_disconnect: bool
    webhook_url: str | None
    fingerprint: Callable[[], bytes]


def asked(
    request: ImageRequest,
    response_format: ResponseFormat,
    body: GenerationBody,
    fingerprint: Callable[[], bytes],
    *,
    cancels: bool,
) -> Asked:
    """What a body asks for. `cancels`: whether the operator lets jobs end when their client leaves.

    Raises:
        InvalidRequest: a variation is to be streamed, which it is not.
    """
    stream = bool(body.stream)
    if stream and request.operation == "variation":
        raise InvalidRequest("variations are not streamed", code="unsupported_parameter", param="stream")
    return Asked(
        request,
        response_format,
        stream,
        cancels and body.cancel_on_disconnect is not False,
        body.webhook_url,
        fingerprint,
    )


def without_previews(request: ImageRequest) -> ImageRequest:
    """For who is answered with finished pictures only: the engine need not show any others."""
    return structs.replace(request, previews=0) if request.previews else request


def idempotency_key_of(exchange: Exchange) -> str | None:
    """The `Idempotency-Key` header.

    Raises:
        InvalidRequest: it is empty, too long or not printable.
    """
    key = exchange.header(b"idempotency-key")
    if key is None:
        return None
    if not _KEY.fullmatch(key):
        raise InvalidRequest(
            f"Idempotency-Key must be 1 to {MAX_KEY_CHARS} printable ASCII characters", param="Idempotency-Key"
        )
    return key.decode("ascii")


def wants_async(exchange: Exchange) -> bool:
    """Whether the client prefers a job to an answer (RFC 7240, 4.1)."""
    prefer = exchange.header(b"prefer")
    return prefer is not None and _RESPOND_ASYNC.search(prefer) is not None


def retries_by_itself(exchange: Exchange) -> bool:
    """Whether it is a client library that asks again when a connection breaks; they all send this header."""
    return exchange.header(b"x-stainless-retry-count") is not None


def is_retry(exchange: Exchange) -> bool:
    """Whether such a library says that this is not its first try."""
    return exchange.header(b"x-stainless-retry-count") not in {None, b"0"}


def traceparent_of(exchange: Exchange) -> str | None:
    """The trace context, where it is one: any other would only break the call that it travels with."""
    given = exchange.header(b"traceparent") or b""
    return given.decode("ascii") if TRACEPARENT.fullmatch(given) else None
