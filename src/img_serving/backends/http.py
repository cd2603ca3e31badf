"""What adapters to HTTP upstreams share: headers, the meaning of an error reply, and finding out which protocol is spoken."""

from __future__ import annotations

import asyncio
import html
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, Literal

import msgspec

from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import (
    AttemptError,
    BackendRefusal,
    ContentRefused,
    InvalidRequest,
    NotFound,
    Outcome,
    PayloadTooLarge,
)
from img_serving.domain.images import Artifact, Call, ItemFailure
from img_serving.ports import Backend, HealthReport, OnProgress, Transport, UpstreamReply

Headers = tuple[tuple[str, str], ...]

MAX_REPLY_BYTES: Final = 256 * 1024 * 1024
MAX_CHECK_BYTES: Final = 4 * 1024 * 1024
"""Model lists and option dictionaries are far smaller."""

PROBE_TIMEOUT_SECONDS: Final = 10.0
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
                text = text.replace(prompt, "…")
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
        code=found.code if found.code and _CODE.fullmatch(found.code) else None,
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
    try:
        async with asyncio.timeout(seconds) as silence:
            yield lambda: silence.reschedule(clock() + seconds)
    except TimeoutError:
        raise AttemptError(Outcome.UNKNOWN, f"no answer and no progress within {seconds:g} s") from None


class DetectingBackend:
    """Finds out once whether an endpoint speaks A1111's protocol or OpenAI's, and is that adapter from then on.

    Only read-only routes are asked, never a picture. A server that has both (stable-diffusion.cpp's) is taken for A1111:
    there a seed, steps and a negative prompt reach the engine, while its OpenAI route draws with seed 42 unless told otherwise
    inside the prompt. A server that answers neither question is taken for OpenAI's (many small ones have no model list), and
    asked again at the next check. It is also asked again after it was down: something else may listen there by then.
    """

    def __init__(
        self,
        openai: Backend,
        a1111: Backend,
        transport: Transport,
        *,
        headers: Sequence[tuple[str, str]] = (),
        base_has_v1: bool = False,
    ) -> None:
        """`openai` and `a1111` are the adapters to choose from; `headers` (credentials among them) go with the questions."""
        self._openai = openai
        self._a1111 = a1111
        self._transport = transport
        self._headers: Headers = tuple(headers)
        self._models_path = "/models" if base_has_v1 else "/v1/models"
        self._chosen: Literal["openai", "a1111"] | None = None
        self._certain = False
        self._because = ""
        self._detecting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<DetectingBackend {self.protocol}: {self._because or 'not asked yet'}>"

    @property
    def protocol(self) -> str:
        """`http` until detected, then `openai` or `a1111`."""
        return self._chosen or "http"

    @property
    def detected_because(self) -> str:
        """What the choice rests on, for people; "" before it."""
        return self._because

    @property
    def capabilities(self) -> Capabilities:
        """Those of the detected protocol; before, one picture a call and one call at a time, which suits either."""
        if self._chosen is not None:
            return self._adapter.capabilities
        either = self._openai.capabilities
        return replace(
            either,
            batch="single",
            max_batch_size=1,
            max_concurrency=1,
            honours=either.honours | self._a1111.capabilities.honours,
        )

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Draw with the detected protocol, which is found out first if need be.

        Raises:
            AttemptError: also `NOT_STARTED` where nobody answered the questions.
            BackendRefusal: the request is at fault.
        """
        if self._chosen is None:
            await self._detect(min(call.timeout_seconds, PROBE_TIMEOUT_SECONDS))
        try:
            return await self._adapter.generate(call, on_progress)
        except AttemptError as error:
            if error.outcome is not Outcome.FAILED and error.busy_seconds is None:
                self._certain = False  # it was down, or went down: the next check asks again
            raise

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Detect if that is not settled, then check as the detected protocol does."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        if not self._certain:
            try:
                await self._detect(timeout_seconds)
            except AttemptError as error:
                return HealthReport(healthy=False, detail=error.message)
        report = await self._adapter.check(max(0.0, deadline - asyncio.get_running_loop().time()))
        if not report.healthy:
            self._certain = False
        return report

    async def close(self) -> None:
        """Close both adapters."""
        await self._openai.close()
        await self._a1111.close()

    @property
    def _adapter(self) -> Backend:
        return self._a1111 if self._chosen == "a1111" else self._openai

    async def _detect(self, timeout_seconds: float) -> None:
        """Ask, unless somebody did while we waited for our turn. Raises AttemptError where nobody answers."""
        before = self._certain, self._chosen
        async with self._detecting:
            if (self._certain, self._chosen) != before and self._chosen is not None:
                return
            try:
                async with asyncio.timeout(timeout_seconds):
                    found, certain, because = await self._ask(timeout_seconds)
            except TimeoutError:
                raise AttemptError(Outcome.NOT_STARTED, "the endpoint did not say in time what it speaks") from None
            except AttemptError as error:
                # Nothing was asked to be drawn, so whatever went wrong, trying elsewhere is free of risk.
                raise AttemptError(Outcome.NOT_STARTED, error.message) from None
            self._chosen, self._certain, self._because = found, certain, because

    async def _ask(self, timeout_seconds: float) -> tuple[Literal["openai", "a1111"], bool, str]:
        statuses = []
        for path, is_a1111 in (("/sdapi/v1/options", _has_options), ("/sdapi/v1/sd-models", _has_checkpoints)):
            reply = await get(self._transport, path, self._headers, timeout_seconds)
            statuses.append(reply.status)
            if reply.status == 200 and is_a1111(_json(reply)):
                return "a1111", True, f"GET {path} answered as A1111 does"
            if reply.status == 401 and reply.headers.get("www-authenticate", "").lower().startswith("basic"):
                # A1111 asks for a password only where a route exists; an OpenAI server asks for a bearer, or without a header.
                return "a1111", True, f"GET {path} asked for a password as A1111 does"
        reply = await get(self._transport, self._models_path, self._headers, timeout_seconds)
        statuses.append(reply.status)
        if reply.status == 200 and isinstance(_json(reply), dict):
            return "openai", True, f"GET {self._models_path} answered as OpenAI does"
        if reply.status in {401, 403}:
            return "openai", True, f"GET {self._models_path} asked for a key"
        if all(status >= 500 for status in statuses):
            raise AttemptError(Outcome.NOT_STARTED, f"the endpoint answers HTTP {statuses[-1]} to every question")
        return "openai", False, "it answers, but neither as A1111 nor as OpenAI does: taken for OpenAI's until it does"


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


def _json(reply: UpstreamReply) -> Any:
    try:
        return msgspec.json.decode(reply.body)
    except (ValueError, RecursionError):
        return None


def _has_options(document: Any) -> bool:
    return isinstance(document, dict) and any(
        name in document for name in ("sd_model_checkpoint", "samples_format", "CLIP_stop_at_last_layers")
    )


def _has_checkpoints(document: Any) -> bool:
    return isinstance(document, list) and all(
        isinstance(one, dict) and ("model_name" in one or "title" in one) for one in document
    )
