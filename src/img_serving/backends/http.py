"""What adapters to HTTP upstreams share: headers, the meaning of an error reply, health pages, and patience."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import msgspec

from img_serving.domain.errors import (
    AttemptError,
    BackendRefusal,
    ContentRefused,
    InvalidRequest,
    NotFound,
    Outcome,
    PayloadTooLarge,
)
from img_serving.domain.images import Call
from img_serving.ports import HealthReport, Transport, UpstreamReply

Headers = tuple[tuple[str, str], ...]

MAX_REPLY_BYTES: Final = 256 * 1024 * 1024
MAX_CHECK_BYTES: Final = 4 * 1024 * 1024
"""Model lists and option dictionaries are far smaller."""

PROBE_TIMEOUT_SECONDS: Final = 10.0
"""For the questions that come before a drawing."""

NO_HURRY_SECONDS: Final = 86_400.0
"""For requests that somebody else bounds (see `patience`)."""

MESSAGE_LIMIT: Final = 300
BUSY_SECONDS: Final = 1.0
BUSY_LIMIT_SECONDS: Final = 60.0

ALIVE_STATUSES: Final = frozenset({400, 404, 405, 410, 429, 501})
"""A server that answers a question it does not understand, or has no time for, is there."""

_SECRET_LENGTH: Final = 6
"""Shorter values would tear holes into innocent words."""

_MODERATION_CODES: Final = frozenset(
    {
        "moderation_blocked",
        "content_policy_violation",
        "content_policy_violated",
        "contentfilter",
        "content_filter",
        "content_filtered",
        "content_moderation",
        "responsibleaipolicyviolation",
        "safety_violation",
        "sensitive_content",
    }
)
_QUOTA_CODES: Final = frozenset(
    {
        "insufficient_quota",
        "quota_exceeded",
        "billing_hard_limit_reached",
        "billing_not_active",
        "budget_exceeded",  # LiteLLM's, for a key of its own
        "insufficient_credits",
    }
)
_MODEL_CODES: Final = frozenset({"model_not_found", "model_not_available", "deploymentnotfound", "notfounderror"})
_MODEL_WORDS: Final = re.compile(
    # vLLM-Omni; LiteLLM; Xinference: they say it in words only
    r"model mismatch: |.*\binvalid model name passed\b|.*\bmodel not found\b",
    re.IGNORECASE | re.DOTALL,
)
_MODERATION_WORDS: Final = re.compile(r".*\bcontentpolicyviolationerror\b", re.IGNORECASE | re.DOTALL)
"""LiteLLM puts the name of its exception before what the provider said, and forgets the provider's code."""

_BUSY_CODES: Final = frozenset({"rate_limit_exceeded", "requests", "tokens", "server_overloaded", "overloaded_error"})
_CLIENT_KINDS: Final = frozenset({"invalid_request_error", "image_generation_user_error", "badrequesterror"})
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_TAGS = re.compile(r"<(script|style)\b.*?</\1\s*>|<[^>]*>", re.DOTALL | re.IGNORECASE)
_TITLE = re.compile(r"<title[^>]*>(.*?)</title", re.DOTALL | re.IGNORECASE)
_UNPRINTABLE = re.compile(r"[\x00-\x20\x7f-\x9f\u2028\u2029]+")


@dataclass(frozen=True, slots=True)
class Complaint:
    """What an error reply says, whatever its shape. `message` is short and safe to show; "" where it says nothing."""

    message: str
    code: str | None = None
    param: str | None = None
    kind: str | None = None


class Redactor:
    """Takes secrets out of what an upstream wrote: some quote the key that they refuse, or the request that failed."""

    def __init__(self, secrets: Iterable[str | None]) -> None:
        parts = {part for secret in secrets if secret for part in (secret, *secret.split())}
        # longest first, so that no secret is left half behind where one holds another
        self._secrets = tuple(sorted((part for part in parts if len(part) >= _SECRET_LENGTH), key=len, reverse=True))

    def __repr__(self) -> str:
        return f"<Redactor of {len(self._secrets)} secrets>"

    def clean(self, text: str, also: Iterable[str | None] = ()) -> str:
        """One line of at most `MESSAGE_LIMIT` characters, without the secrets and without `also` (prompts)."""
        for secret in self._secrets:
            text = text.replace(secret, "***")
        for prompt in also:
            if prompt and len(prompt) >= _SECRET_LENGTH:
                text = _without(text, prompt)
        text = _UNPRINTABLE.sub(" ", text).strip()
        return text if len(text) <= MESSAGE_LIMIT else text[: MESSAGE_LIMIT - 1] + "…"


def call_headers(configured: Headers, call: Call, content_type: str = "application/json") -> Headers:
    """The headers of a generating POST: the operator's own, and what lets one request be followed through both logs."""
    headers = (*configured, ("Content-Type", content_type))
    if call.request_id:
        headers += (("X-Request-Id", call.request_id),)
    if call.traceparent:
        headers += (("traceparent", call.traceparent),)
    return headers


def prompts_of(call: Call) -> list[str | None]:
    """Everything in a call that is the client's own text."""
    return [text for item in call.items for text in (item.prompt, item.negative_prompt)]


def complaint_of(reply: UpstreamReply, redactor: Redactor, also: Iterable[str | None] = ()) -> Complaint:
    """Read an error body: `{"error": {…}}`, `{"error": "text"}`, `{"detail": …}`, A1111's, plain text or HTML."""
    body = bytes(reply.body[: 64 * 1024])
    try:
        found = _complaint_in(msgspec.json.decode(body))
    except (ValueError, RecursionError):
        found = Complaint(_plain_text(body))
    return replace(
        found,
        message=redactor.clean(found.message, also),
        code=found.code
        if found.code and _CODE.fullmatch(found.code) and redactor.clean(found.code) == found.code
        else None,
        param=redactor.clean(found.param, also) if found.param else None,
    )


def error_of(
    reply: UpstreamReply, redactor: Redactor, also: Iterable[str | None] = ()
) -> AttemptError | BackendRefusal:
    """What a reply other than 2xx means: whose fault it is, and whether trying elsewhere is free of risk.

    400, 413 and 422 are the request's fault, and so are refused content and a model that the upstream says it does not have;
    everything else is the endpoint's. Credentials and quotas are the operator's, who is told in the log: the client learns no
    more than that.
    """
    status = reply.status
    complaint = complaint_of(reply, redactor, also)
    codes = {name.lower() for name in (complaint.code, complaint.kind) if name}
    said = f": {complaint.message}" if complaint.message else ""
    if codes & _QUOTA_CODES or status == 402:
        return AttemptError(Outcome.FAILED, f"the backend's account has no quota left (HTTP {status})")
    if 400 <= status < 500 and (codes & _MODERATION_CODES or _MODERATION_WORDS.match(complaint.message)):
        message = complaint.message or "the backend refused the content"
        return BackendRefusal(ContentRefused(message, param=complaint.param))
    if status in {400, 404, 422} and (codes & _MODEL_CODES or _MODEL_WORDS.match(complaint.message)):
        message = complaint.message or "the backend does not have this model"
        return BackendRefusal(NotFound(message, code="model_not_found", param="model"))
    if status in {400, 422}:
        message = complaint.message or f"the backend refused the request (HTTP {status})"
        return BackendRefusal(InvalidRequest(message, code=complaint.code, param=complaint.param))
    if status == 413:
        return BackendRefusal(PayloadTooLarge(complaint.message or "the request is too large for the backend"))
    if status in {401, 403}:
        return AttemptError(Outcome.FAILED, f"the backend refused the gateway's credentials (HTTP {status})")
    if status in {429, 503}:
        return AttemptError(
            Outcome.NOT_STARTED, f"the backend is busy (HTTP {status}){said}", busy_seconds=busy_seconds(reply)
        )
    if status in {504, 524}:
        # A proxy gave up waiting; the engine behind it may be drawing still, and somebody may be paying for it.
        return AttemptError(Outcome.UNKNOWN, f"a proxy before the backend gave up (HTTP {status}){said}")
    if 300 <= status < 400:
        return AttemptError(Outcome.FAILED, f"{_redirect_hint(reply, redactor)} (HTTP {status})")
    return AttemptError(Outcome.FAILED, f"the backend answered HTTP {status}{said}")


def error_in_stream(body: bytes, redactor: Redactor, also: Iterable[str | None] = ()) -> AttemptError | BackendRefusal:
    """What an error event means: it has the body of an error reply, nested or flat, but its status is 200 for good."""
    complaint = complaint_of(UpstreamReply(200, {}, body), redactor, also)
    codes = {name.lower() for name in (complaint.code, complaint.kind) if name}
    if codes & (_BUSY_CODES | _QUOTA_CODES):
        return error_of(UpstreamReply(429, {}, body), redactor, also)
    if codes & (_CLIENT_KINDS | _MODERATION_CODES | _MODEL_CODES):
        return error_of(UpstreamReply(400, {}, body), redactor, also)
    said = f": {complaint.message}" if complaint.message else ""
    return AttemptError(Outcome.FAILED, f"the backend's stream ended in an error{said}")


def busy_seconds(reply: UpstreamReply, now: datetime | None = None) -> float:
    """How long to leave a busy endpoint alone: `retry-after-ms`, else `Retry-After` (seconds or a date), else 1 second."""
    wait = _number(reply.headers.get("retry-after-ms", ""))
    if wait is not None:
        wait /= 1000
    else:
        text = reply.headers.get("retry-after", "").strip()
        wait = _number(text)
        if wait is None and text:
            # the server's own clock, where it tells, so that ours may be wrong
            base = _date(reply.headers.get("date", "")) or now or datetime.now(UTC)
            until = _date(text)
            wait = (until - base).total_seconds() if until else None
    if wait is None or not 0 <= wait < float("inf"):
        return BUSY_SECONDS
    return min(wait, BUSY_LIMIT_SECONDS)


async def get(transport: Transport, path: str, headers: Headers, timeout_seconds: float) -> UpstreamReply:
    """One read-only question."""
    return await transport.request(
        "GET", path, headers=headers, timeout_seconds=timeout_seconds, max_body_bytes=MAX_CHECK_BYTES
    )


async def check_path(transport: Transport, path: str, headers: Headers, timeout_seconds: float) -> HealthReport | None:
    """Ask the health path that the operator configured. None: it is not there (404), so the protocol's own check has to do."""
    try:
        reply = await get(transport, path, headers, timeout_seconds)
    except AttemptError as error:
        return HealthReport(healthy=False, detail=error.message)
    if reply.status == 404:
        return None
    return HealthReport(healthy=200 <= reply.status < 300, detail=f"{path} answered HTTP {reply.status}")


def unhealthy(reply: UpstreamReply, path: str) -> HealthReport:
    """The report for a reply that says the endpoint cannot work now. Bodies are not quoted: the status says enough."""
    if reply.status in {401, 403}:
        return HealthReport(healthy=False, detail=f"{path}: the credentials were refused (HTTP {reply.status})")
    hint = "; it redirects: configure the address that it points to" if 300 <= reply.status < 400 else ""
    return HealthReport(healthy=False, detail=f"{path} answered HTTP {reply.status}{hint}")


@asynccontextmanager
async def patience(seconds: float) -> AsyncIterator[Callable[[], None]]:
    """Ends a call that has been silent for `seconds`; what is given is to be called at every sign of life.

    For engines that tell how far they are: requests inside pass `NO_HURRY_SECONDS`, for a long drawing is not a silent one.

    Raises:
        AttemptError: `UNKNOWN`: nothing was heard for too long.
    """
    clock = asyncio.get_running_loop().time
    is_over = False

    def heard() -> None:
        if not (is_over or silence.expired()):
            silence.reschedule(clock() + seconds)

    try:
        async with asyncio.timeout(seconds) as silence:
            try:
                yield heard
            finally:
                is_over = True
    except TimeoutError:
        raise AttemptError(Outcome.UNKNOWN, f"no answer and no progress within {seconds:g} s") from None


def _complaint_in(document: Any) -> Complaint:
    """Find message, code and parameter in a decoded error body."""
    if isinstance(document, str):
        return Complaint(document)
    if isinstance(document, list):
        return _from_details(document)
    if not isinstance(document, dict):
        return Complaint("")
    error = document.get("error")
    if isinstance(error, dict):
        inner = error.get("innererror") or error.get("inner_error")
        code = _text(error.get("code"))
        if isinstance(inner, dict) and _text(inner.get("code")).lower() in _MODERATION_CODES:
            code = _text(inner["code"])  # Azure: the outer code only says that something was wrong
        return Complaint(
            _text(error.get("message")) or _text(error.get("detail")),
            _said(code),
            _said(error.get("param")),
            _said(error.get("type")),
        )
    detail = document.get("detail")
    if isinstance(detail, list):
        return _from_details(detail)
    if isinstance(detail, dict):
        return _complaint_in(detail if "error" in detail or "detail" in detail else {"error": detail})
    # A1111: {"error": "OutOfMemoryError", "detail": "", "body": …, "errors": "CUDA out of memory. …"}
    # sd.cpp: {"error": "server_error", "message": …}; vLLM before it nested them: {"object": "error", "message": …, "type": …}
    parts = [_text(error), _text(detail), _text(document.get("errors")), _text(document.get("message"))]
    return Complaint(
        ": ".join(dict.fromkeys(part for part in parts if part)),
        _said(document.get("code")),
        _said(document.get("param")),
        _said(document.get("type")),
    )


def _from_details(details: list[Any]) -> Complaint:
    """FastAPI's `[{"loc": ["body", "size"], "msg": "…", "input": …}]`; the input is not quoted."""
    messages = []
    param = None
    for detail in details[:3]:
        if not isinstance(detail, dict):
            messages.append(_text(detail))
            continue
        location = detail.get("loc")
        names = [str(part) for part in location if part != "body"] if isinstance(location, list) else []
        where = ".".join(names)
        messages.append(f"{where}: {_text(detail.get('msg'))}" if where else _text(detail.get("msg")))
        param = param or (names[0] if names else None)
    return Complaint("; ".join(message for message in messages if message), param=param)


def _plain_text(body: bytes) -> str:
    text = body[:4096].decode("utf-8", "replace")
    if "<" in text and (title := _TITLE.search(text)):
        text = title[1]
    return html.unescape(_TAGS.sub(" ", text))


def _redirect_hint(reply: UpstreamReply, redactor: Redactor) -> str:
    location = redactor.clean(reply.headers.get("location", "").partition("?")[0])
    where = f" to {location}" if location and "@" not in location else ""
    return f"the backend redirects{where}: configure the address that it points to"


def _without(text: str, prompt: str) -> str:
    """The text without the prompt: as it was, as JSON writes it, or with its blanks folded, as log lines have it."""
    for spelt in (prompt, json.dumps(prompt)[1:-1], json.dumps(prompt, ensure_ascii=False)[1:-1]):
        text = text.replace(spelt, "…")
    words = prompt.split()
    if len(words) > 1 and words[0] in text:
        text = re.sub(r"\s+".join(re.escape(word) for word in words), "…", text)
    return text


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, IndexError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _said(value: Any) -> str | None:
    """A code, parameter or type. LiteLLM writes a missing one as "None", and the status as a code: neither says anything."""
    text = _text(value)
    return None if text in {"", "None"} or text.isdecimal() else text
