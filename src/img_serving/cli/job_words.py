"""A job in words: how far it is, what came of it, and the addresses of its pictures."""

from __future__ import annotations

from typing import Final

import msgspec

from img_serving.cli.endings import CommandFailed, printable
from img_serving.domain.stored import OVER

COLOURS: Final = {"succeeded": "green", "failed": "red", "expired": "red", "cancelled": "dim", "running": "bold"}
"""What a status looks like; the others are plain."""


class SeenPicture(msgspec.Struct, frozen=True):
    """A picture of a result; `url` None: it came as base64, which is not read here."""

    url: str | None = None


class SeenResult(msgspec.Struct, frozen=True):
    """A result."""

    data: tuple[SeenPicture, ...] = ()


class SeenError(msgspec.Struct, frozen=True):
    """How a job failed."""

    message: str
    code: str | None = None


class SeenJob(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line reads of a job's record (`gateway.job_records.JobRecord`). Times are Unix seconds."""

    id: str
    operation: str
    status: str
    model: str | None
    n: int
    position: int | None
    eta_seconds: float | None
    progress: float
    attempts: int
    backend: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    expires_at: float | None
    request_id: str
    idempotency_key: str | None
    webhook_url: str | None
    waiting_for: str | None
    result: SeenResult | None
    error: SeenError | None


class SeenJobs(msgspec.Struct, frozen=True, kw_only=True):
    """A page of jobs."""

    data: list[SeenJob]
    last_id: str | None
    has_more: bool


def read_record(body: bytes) -> SeenJob:
    """The record in an answer or an event.

    Raises:
        CommandFailed: there is none.
    """
    try:
        return msgspec.json.decode(body, type=SeenJob)
    except msgspec.DecodeError as error:
        raise CommandFailed(f"the answer is not a job ({error}): is there an img-serving gateway?") from error


def read_page(body: bytes) -> SeenJobs:
    """The jobs of a list.

    Raises:
        CommandFailed: it is none.
    """
    try:
        return msgspec.json.decode(body, type=SeenJobs)
    except msgspec.DecodeError as error:
        raise CommandFailed(f"the answer is not a list of jobs ({error}): is there an img-serving gateway?") from error


def is_over(record: SeenJob) -> bool:
    """Whether it has ended."""
    return record.status in OVER


def one_line(text: str) -> str:
    """`text` from a server, as a part of a line of ours."""
    return printable(text.replace("\n", " "))


def brief(seconds: float) -> str:
    """A duration in its greatest unit: `45s`, `12m`, `3h`, `2d`."""
    if seconds < 60:
        return f"{max(0.0, seconds):.0f}s"
    for unit, each, below in (("m", 60, 60), ("h", 3600, 48)):
        if seconds < each * below:
            return f"{seconds / each:.0f}{unit}"
    return f"{seconds / 86400:.0f}d"


def place(record: SeenJob) -> str:
    """Where it stands, in a few characters: `45% ~12s`, `#3 ~2m` (third in line), `100%`, or `-`."""
    if is_over(record):
        return "100%" if record.status == "succeeded" else "-"
    eta = "" if record.eta_seconds is None else f" ~{brief(record.eta_seconds)}"
    if record.status == "running":
        return f"{record.progress:.0%}{eta}"
    return f"waits{eta}" if record.position is None else f"#{record.position + 1:,}{eta}"


def state(record: SeenJob) -> str:
    """Where it stands, in words; without how long it will take."""
    words = [one_line(record.status)]
    if record.status == "queued":
        words.append("for a backend" if record.position is None else f"#{record.position + 1:,} in line")
    elif record.status == "running" and record.backend is not None:
        words.append(f"on {one_line(record.backend)}")
    if record.attempts > 1 and not is_over(record):
        words.append(f"attempt {record.attempts}")
    return ", ".join(words)


def urls_of(record: SeenJob) -> list[str | None]:
    """Where each picture of its result is; None: it came as base64."""
    pictures = () if record.result is None else record.result.data
    return [None if one.url is None or one.url.startswith("data:") else one_line(one.url) for one in pictures]


def error_of(record: SeenJob) -> str:
    """What went wrong and its code; "" for nothing."""
    error = record.error
    if error is None:
        return ""
    return one_line(error.message[:2000] + (f" ({error.code})" if error.code else ""))
