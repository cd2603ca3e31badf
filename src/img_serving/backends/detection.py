"""Finding out which protocol an endpoint speaks, with questions that draw nothing, and being that adapter from then on."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from img_serving.backends.http import PROBE_TIMEOUT_SECONDS, Headers, get
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure
from img_serving.ports import Backend, HealthReport, OnProgress, Transport, UpstreamReply

FALLBACK: Final = "openai"
"""Who answers no question is taken for one of the many small servers that have no list of models."""


@dataclass(frozen=True, slots=True)
class Detection:
    """Which protocol, and what the choice rests on, for people. One that is not `certain` is looked into again."""

    protocol: str
    because: str
    certain: bool = True


class DetectingBackend:
    """Finds out once what an endpoint speaks, and is that adapter from then on.

    Only read-only routes are asked, never a picture. A server that speaks A1111's and OpenAI's protocols
    (stable-diffusion.cpp's) is taken for A1111: there a seed, steps and a negative prompt reach the engine, while its OpenAI
    route draws with seed 42 unless told otherwise inside the prompt. It is asked again after it was down: something else may
    listen there by then.
    """

    def __init__(
        self, adapters: Mapping[str, Backend], transport: Transport, *, headers: Sequence[tuple[str, str]] = ()
    ) -> None:
        """`adapters` by protocol, `openai` among them; `headers` (credentials among them) go with the questions."""
        self._adapters = dict(adapters)
        self._transport = transport
        self._headers: Headers = tuple(headers)
        self._found: Detection | None = None
        self._detecting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<DetectingBackend {self.protocol}: {self._found.because if self._found else 'not asked yet'}>"

    @property
    def protocol(self) -> str:
        """`http` until detected."""
        return self._found.protocol if self._found is not None else "http"

    @property
    def detection(self) -> Detection | None:
        """What was found, once it was."""
        return self._found

    @property
    def capabilities(self) -> Capabilities:
        """Those of the detected protocol; before, one picture a call and one call at a time, which suits any."""
        if self._found is not None:
            return self._adapter.capabilities
        able = [one.capabilities for one in self._adapters.values()]
        return Capabilities(
            operations=frozenset().union(*(one.operations for one in able)),
            honours=frozenset().union(*(one.honours for one in able)),
            max_images=max(one.max_images for one in able),
            masks=any(one.masks for one in able),
            max_concurrency=1,
        )

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """Draw with the detected protocol, which is found out first if need be.

        Raises:
            AttemptError: also `NOT_STARTED` where nobody answered the questions.
            BackendRefusal: the request is at fault.
        """
        if self._found is None:
            await self._detect(min(call.timeout_seconds, PROBE_TIMEOUT_SECONDS))
        try:
            return await self._adapter.generate(call, on_progress)
        except AttemptError as error:
            if error.busy_seconds is None:
                self._doubt()  # it is down, or it is another server by now: the next check asks again
            raise

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Detect if that is not settled, then check as the detected protocol does."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        if self._found is None or not self._found.certain:
            try:
                await self._detect(timeout_seconds)
            except AttemptError as error:
                hint = '; if it speaks gRPC, its address is grpc://… and protocol "grpc" or "kserve"'
                detail = error.message + hint if "not HTTP" in error.message else error.message
                return HealthReport(healthy=False, detail=detail)
        report = await self._adapter.check(max(0.0, deadline - asyncio.get_running_loop().time()))
        if not report.healthy:
            self._doubt()
        found = self._found
        if found is None:
            return report
        return replace(report, found=f"{report.found or found.protocol}; {found.because}")

    async def close(self) -> None:
        """Close every adapter."""
        for adapter in self._adapters.values():
            await adapter.close()

    @property
    def _adapter(self) -> Backend:
        return self._adapters[self._found.protocol if self._found is not None else FALLBACK]

    def _doubt(self) -> None:
        if self._found is not None:
            self._found = replace(self._found, certain=False)

    async def _detect(self, timeout_seconds: float) -> None:
        """Ask, unless somebody did while we waited for our turn. Raises AttemptError where nobody answers."""
        before = self._found
        async with self._detecting:
            if self._found is not before and self._found is not None:
                return
            try:
                async with asyncio.timeout(timeout_seconds):
                    found = await detect(self._transport, self._headers, timeout_seconds)
            except TimeoutError:
                raise AttemptError(Outcome.NOT_STARTED, "the endpoint did not say in time what it speaks") from None
            except AttemptError as error:
                # Nothing was asked to be drawn, so whatever went wrong, trying elsewhere is free of risk.
                raise AttemptError(Outcome.NOT_STARTED, error.message) from None
            self._found = found if found.protocol in self._adapters else replace(found, protocol=FALLBACK)


async def detect(transport: Transport, headers: Headers, timeout_seconds: float) -> Detection:
    """Ask an endpoint what it speaks.

    Raises:
        AttemptError: nobody answers, or nothing but errors of its own.
    """
    statuses = []
    for path, is_a1111 in (("/sdapi/v1/options", _has_options), ("/sdapi/v1/sd-models", _has_checkpoints)):
        reply = await get(transport, path, headers, timeout_seconds)
        statuses.append(reply.status)
        if reply.status == 200 and _is_gateway(_json(reply)):
            return Detection("openai", f"GET {path} says that it is an img-serving, whose own API is OpenAI's")
        if reply.status == 200 and is_a1111(_json(reply)):
            return Detection("a1111", f"GET {path} answered as A1111 does")
        if reply.status == 401 and reply.headers.get("www-authenticate", "").lower().startswith("basic"):
            # A1111 asks for a password only where a route exists; an OpenAI server asks for a bearer, or without a header.
            return Detection("a1111", f"GET {path} asked for a password as A1111 does")
    reply = await get(transport, "/prompt", headers, timeout_seconds)
    statuses.append(reply.status)
    if reply.status == 200 and _has_queue(_json(reply)):
        return Detection("comfyui", "GET /prompt answered as ComfyUI does")
    reply = await get(transport, "/v1/models", headers, timeout_seconds)
    statuses.append(reply.status)
    if reply.status == 200 and isinstance(_json(reply), dict):
        return Detection("openai", "GET /v1/models answered as OpenAI does")
    if reply.status in {401, 403}:
        return Detection("openai", "GET /v1/models asked for a key")
    if all(status >= 500 for status in statuses):
        raise AttemptError(Outcome.NOT_STARTED, f"the endpoint answers HTTP {statuses[-1]} to every question")
    because = "it answers, but neither as A1111, ComfyUI nor OpenAI does: taken for OpenAI's until it does"
    return Detection(FALLBACK, because, certain=False)


def _json(reply: UpstreamReply) -> Any:
    try:
        return msgspec.json.decode(reply.body)
    except (ValueError, RecursionError):
        return None


def _is_gateway(document: Any) -> bool:
    return isinstance(document, dict) and document.get("served_by") == "img-serving"


def _has_options(document: Any) -> bool:
    return isinstance(document, dict) and any(
        name in document for name in ("sd_model_checkpoint", "samples_format", "CLIP_stop_at_last_layers")
    )


def _has_checkpoints(document: Any) -> bool:
    return (
        isinstance(document, list)
        and bool(document)
        and all(isinstance(one, dict) and ("model_name" in one or "title" in one) for one in document)
    )


def _has_queue(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("exec_info"), dict)
