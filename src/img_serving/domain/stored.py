"""A job as the job store keeps it: what was asked, where it stands, and what came of it.

These records outlive the program that wrote them: fields are only ever added, each with a default.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from img_serving.domain.errors import GatewayError, Recorded
from img_serving.domain.images import ImageRequest, MediaType
from img_serving.domain.jobs import JobStatus

ResponseFormat = Literal["url", "b64_json", "file"]

OVER = frozenset({JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED, JobStatus.EXPIRED})
"""The states that a job does not leave again."""


class StoredPicture(msgspec.Struct, frozen=True, gc=False):
    """One picture of a result: its name in the artifact store, and what the reply says of it."""

    name: str
    media_type: MediaType
    width: int
    height: int
    seed: int | None = None
    revised_prompt: str | None = None


class StoredResult(msgspec.Struct, frozen=True):
    """What a succeeded job is answered with, each time alike: the pictures, and what is said beside them.

    `created` is Unix seconds; `base_url` is what the URLs of its pictures began with when they were given out.
    """

    created: int
    pictures: tuple[StoredPicture, ...]
    response_format: ResponseFormat
    base_url: str
    ignored: tuple[str, ...] = ()


class StoredError(msgspec.Struct, frozen=True):
    """How a job failed, as its client is told."""

    message: str
    kind: str
    status: int
    code: str | None = None
    param: str | None = None

    @classmethod
    def of(cls, error: GatewayError) -> StoredError:
        """What is kept of an error."""
        return cls(error.message, error.kind, error.status, error.code, error.param)

    def again(self) -> Recorded:
        """The same error, to be told again."""
        return Recorded(self.message, kind=self.kind, status=self.status, code=self.code, param=self.param)


class StoredJob(msgspec.Struct, frozen=True, kw_only=True):
    """One durable job. Times are Unix seconds.

    `request` has no bytes of its input pictures: `InputImage.spooled` names them. `fingerprint` tells whether two requests are
    the same. `is_async`: nobody waits for it on a connection. `artifact_key` (16 random bytes) makes the names of its
    pictures, so that a second try replaces what a crash has left. `at_risk` counts calls that may have been paid for and that
    are not known to have failed: while there are any, the job is not drawn again after a crash.
    """

    id: str
    tenant: str
    request: ImageRequest
    created_at: float
    deadline_at: float
    response_format: ResponseFormat
    base_url: str
    artifact_key: bytes
    fingerprint: bytes = b""
    status: JobStatus = JobStatus.QUEUED
    is_async: bool = True
    request_id: str = ""
    traceparent: str | None = None
    idempotency_key: str | None = None
    webhook_url: str | None = None
    started_at: float | None = None
    finished_at: float | None = None
    expires_at: float | None = None
    backend: str | None = None
    attempts: int = 0
    at_risk: int = 0
    result: StoredResult | None = None
    error: StoredError | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status in OVER

    @property
    def spooled(self) -> tuple[str, ...]:
        """The names of its input pictures."""
        masks = () if self.request.mask is None else (self.request.mask,)
        return tuple(one.spooled for one in (*self.request.images, *masks) if one.spooled is not None)
