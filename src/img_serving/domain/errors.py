"""Errors say what went wrong; edges say how: `api/` maps them to HTTP, a worker to gRPC.

`kind` is the OpenAI error `type`, `code` its machine-readable reason, `param` the field at fault.
`status` is a *hint* for HTTP (as in h11): the edge decides.
"""

from __future__ import annotations

from enum import StrEnum
from typing import ClassVar


class GatewayError(Exception):
    """Anything that a caller is told. `message` is safe to show: it never holds a secret or a prompt."""

    kind: str = "server_error"
    default_code: ClassVar[str | None] = None
    status: int = 500

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_seconds: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        """Args are what the error object and its headers say; `should_retry` None lets the client's own rule stand."""
        super().__init__(message)
        self.message = message
        self.code = code if code is not None else self.default_code
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.should_retry = should_retry


class InvalidRequest(GatewayError):
    """The caller asked for something impossible; `param` names the field."""

    kind = "invalid_request_error"
    default_code = "invalid_value"
    status = 400


class ContentRefused(InvalidRequest):
    """A backend refused the prompt or the picture on grounds of content. Never retried, never counted against it."""

    kind = "image_generation_user_error"
    default_code = "moderation_blocked"


class Unauthorized(GatewayError):
    """No key, or one that nobody has."""

    kind = "invalid_request_error"
    default_code = "invalid_api_key"
    status = 401


class Forbidden(GatewayError):
    """A known key that may not do this."""

    kind = "invalid_request_error"
    default_code = "permission_denied"
    status = 403


class NotFound(GatewayError):
    """There is no such thing, or it is not the caller's."""

    kind = "invalid_request_error"
    default_code = "not_found"
    status = 404


class MethodNotAllowed(GatewayError):
    """The path exists, the method does not."""

    kind = "invalid_request_error"
    default_code = "method_not_allowed"
    status = 405


class Conflict(GatewayError):
    """The name is taken, or the thing belongs to somebody else (a file)."""

    kind = "invalid_request_error"
    default_code = "conflict"
    status = 409


class PayloadTooLarge(GatewayError):
    """The body is over the route's limit."""

    kind = "invalid_request_error"
    default_code = "payload_too_large"
    status = 413


class UnsupportedMediaType(GatewayError):
    """The body is not of a type that the route reads."""

    kind = "invalid_request_error"
    default_code = "unsupported_media_type"
    status = 415


class RateLimited(GatewayError):
    """The caller is over a limit of its own; `retry_after_seconds` says when it is not."""

    kind = "requests"
    default_code = "rate_limit_exceeded"
    status = 429


class QueueFull(GatewayError):
    """The gateway has as much waiting work as it may hold."""

    default_code = "queue_full"
    status = 503


class DeadlineUnreachable(GatewayError):
    """What is waiting already takes longer than the request may: it is refused now instead of failing later."""

    default_code = "deadline_unreachable"
    status = 503


class Draining(GatewayError):
    """The gateway is stopping and takes no new work."""

    default_code = "draining"
    status = 503


class NoUsableBackend(GatewayError):
    """Every endpoint of the route is ejected, broken or gone, and the last hopes failed too."""

    default_code = "no_usable_backend"
    status = 503


class AllAttemptsFailed(GatewayError):
    """Every endpoint that was tried failed; the message says how the last one did."""

    default_code = "backend_failed"
    status = 502


class OutcomeUnknown(AllAttemptsFailed):
    """Nobody knows how a call ended that may have been paid for: it was cut after it was sent, or the gateway stopped.

    Only a person can say whether to ask again.
    """

    default_code = "outcome_unknown"


class DeadlineExceeded(GatewayError):
    """The job's deadline passed, waiting or running."""

    default_code = "deadline_exceeded"
    status = 504


class StorageFailed(GatewayError):
    """A finished picture could not be stored: the disk is full, read-only or gone."""

    default_code = "storage_failed"
    status = 507


class Cancelled(GatewayError):
    """The job was cancelled: its client left, or somebody asked for it."""

    default_code = "cancelled"
    status = 499


class Recorded(GatewayError):
    """How a job failed earlier, told again. Asking once more would tell the same."""

    def __init__(self, message: str, *, kind: str, status: int, code: str | None, param: str | None) -> None:
        """All as it was told the first time."""
        super().__init__(message, code=code, param=param, should_retry=False)
        self.kind = kind
        self.status = status


class StartError(Exception):
    """The gateway cannot start; the message says what is wrong and what to do."""


class Outcome(StrEnum):
    """How an attempt ended. A client error and a cancellation are none of these four (see `BackendRefusal`)."""

    OK = "ok"
    NOT_STARTED = "not_started"
    FAILED = "failed"
    UNKNOWN = "unknown"


class AttemptError(Exception):
    """An attempt that did not succeed, mapped once by the adapter that knows the protocol.

    `outcome` is `NOT_STARTED` (refused, or no connection before anything was sent: a second try is free of risk), `FAILED`
    (a definite error) or `UNKNOWN` (cut or timed out after sending: the engine may have drawn, and been paid, anyway).
    `busy_seconds` is the endpoint's own Retry-After, where it said one. `is_blameless`: the endpoint did nothing wrong (it
    lacks what it never promised to have), so that it is not left alone for it.
    """

    def __init__(
        self, outcome: Outcome, message: str, *, busy_seconds: float | None = None, is_blameless: bool = False
    ) -> None:
        """`message` is shown to the client: no secret, no prompt."""
        super().__init__(message)
        self.outcome = outcome
        self.message = message
        self.busy_seconds = busy_seconds
        self.is_blameless = is_blameless


class BackendRefusal(Exception):
    """The backend says that the *request* is at fault (bad prompt, refused content, unsupported value).

    It goes back to the client at once, is not tried elsewhere and never counts against the endpoint.
    """

    def __init__(self, error: GatewayError) -> None:
        """`error` is what the client is told."""
        super().__init__(error.message)
        self.error = error
