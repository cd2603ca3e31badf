"""Errors as HTTP: the four-key error object, on every failure, with the headers that make clients behave."""

from __future__ import annotations

import math
from http import HTTPStatus

import msgspec

from img_serving.api.exchange import Reply
from img_serving.domain.errors import GatewayError

MAX_RETRY_AFTER_SECONDS = 59
"""Popular clients obey Retry-After only below a minute, and back off for half a second when it says more."""


class ErrorDetail(msgspec.Struct, frozen=True):
    """What went wrong: all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of every reply that is not a success."""

    error: ErrorDetail


def reply_to(error: GatewayError) -> Reply:
    """The reply that tells a client of `error`."""
    body = msgspec.json.encode(ErrorBody(error_detail(error)))
    headers: list[tuple[bytes, bytes]] = []
    if error.retry_after_seconds is not None:
        seconds = max(1, min(MAX_RETRY_AFTER_SECONDS, math.ceil(error.retry_after_seconds)))
        milliseconds = max(1, min(MAX_RETRY_AFTER_SECONDS * 1000, math.ceil(error.retry_after_seconds * 1000)))
        headers += [
            (b"retry-after", b"%d" % seconds),
            (b"retry-after-ms", b"%d" % milliseconds),
            (b"x-queue-eta-seconds", b"%.3f" % error.retry_after_seconds),
        ]
    if error.should_retry is not None:
        headers.append((b"x-should-retry", b"true" if error.should_retry else b"false"))
    if error.status == HTTPStatus.UNAUTHORIZED:
        headers.append((b"www-authenticate", b'Bearer realm="img-serving"'))
    return Reply(error.status, (body,), headers=headers)


def error_detail(error: GatewayError) -> ErrorDetail:
    """The error object."""
    return ErrorDetail(message=_printable(error.message), type=error.kind, param=error.param, code=error.code)


def _printable(message: str) -> str:
    """A message may quote what a client sent: half a surrogate pair cannot be encoded, and would break the reply."""
    return message.encode("utf-8", "replace").decode()
