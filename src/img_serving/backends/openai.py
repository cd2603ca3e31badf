"""The adapter to servers that speak OpenAI's Images API: hosted ones, LocalAI, vLLM-Omni, SGLang and many more."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from typing import Any, Final

import msgspec

from img_serving.backends.http import (
    ALIVE_STATUSES,
    MAX_REPLY_BYTES,
    Headers,
    Redactor,
    call_headers,
    check_path,
    error_of,
    get,
    prompts_of,
    unhealthy,
)
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.images import SEED_LIMIT, Artifact, Call, ItemFailure
from img_serving.media.payload import artifact_from_base64, artifact_from_bytes
from img_serving.media.scan import SKELETON_BYTES, split_images_json
from img_serving.ports import HealthReport, OnProgress, Transport
from img_serving.transport.fetch import FetchFailed, UrlFetcher

MAX_BATCH_SIZE: Final = 10

HONOURED: Final = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance_scale",
    "quality": "quality",
    "style": "style",
    "background": "background",
    "moderation": "moderation",
    "output_format": "output_format",
    "output_compression": "output_compression",
    "user": "user",
    "sampler": "sampler",
    "scheduler": "scheduler",
    "clip_skip": "clip_skip",
}
"""Parameters that are passed on under their own names, and the field of `ImageRequest` that holds each."""

_NO_RESPONSE_FORMAT = re.compile(r"(gpt-image|chatgpt-image)")
"""These models always answer in base64 and refuse to be asked for it."""


class _Picture(msgspec.Struct):
    """One of `data`. What a picture can do without is `Any`: an odd note must not cost a picture that was paid for."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: Any = None
    seed: Any = None


class _Reply(msgspec.Struct):
    data: list[_Picture]


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


SMALL_BYTES = 16 * 1024
"""Up to here a reply is simply decoded: copying its strings costs less than finding where they stand."""

_REPLY = msgspec.json.Decoder(_Reply)
_MODELS = msgspec.json.Decoder(_Models)


class OpenAIBackend:
    """Speaks to one endpoint through `transport`, whose base URL holds any path prefix."""

    def __init__(
        self,
        transport: Transport,
        *,
        api_key: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        base_has_v1: bool = False,
        health_check_path: str | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        fetch: UrlFetcher | None = None,
        secrets: Sequence[str] = (),
    ) -> None:
        """Describe the endpoint.

        Args:
            transport: HTTP to the endpoint; closed by `close`.
            api_key: sent as a bearer; its presence says that somebody pays for pictures.
            headers: sent with every request.
            base_has_v1: whether the transport's base URL is the API's root already (`…/v1`).
            health_check_path: asked instead of the model list to learn about health.
            secrets: what else must never be quoted (a password that `headers` hold in another form).
            max_reply_bytes: the largest reply, and the largest picture behind a URL.
            fetch: gets pictures that come as URLs; None refuses them.
        """
        self._transport = transport
        self._headers: Headers = (*headers, *((("Authorization", f"Bearer {api_key}"),) if api_key else ()))
        root = "" if base_has_v1 else "/v1"
        self._generations_path = f"{root}/images/generations"
        self._models_path = f"{root}/models"
        self._health_check_path = health_check_path
        self._max_reply_bytes = max_reply_bytes
        self._fetch = fetch
        self._redactor = Redactor([api_key, *secrets, *(value for _, value in headers)])
        self._capabilities = Capabilities(
            batch="request",
            max_batch_size=MAX_BATCH_SIZE,
            honours=frozenset({"seed", "negative_prompt", "size", *HONOURED}),
        )

    @property
    def protocol(self) -> str:
        """Always `openai`."""
        return "openai"

    @property
    def capabilities(self) -> Capabilities:
        """Every parameter is passed on; what the server makes of it, it does not tell."""
        return self._capabilities

    async def generate(
        self,
        call: Call,
        on_progress: OnProgress,  # noqa: ARG002 - the protocol tells nothing before the reply
    ) -> Sequence[Artifact | ItemFailure]:
        """One POST for all items. Cancelling closes its connection, which is all the cancellation that the protocol has.

        Pictures that are missing or broken beside good ones are `ItemFailure`s: only they are drawn, and paid for, again.

        Raises:
            AttemptError: see `error_of`; also `FAILED` where a complete reply holds no good picture.
            BackendRefusal: the request is at fault.
        """
        if call.request.seed_given and len(call.items) > 1:
            # The protocol has one seed for n pictures. Only a batch formed before the protocol was detected comes here.
            raise AttemptError(Outcome.NOT_STARTED, "pictures with seeds of their own take one call each")
        deadline = asyncio.get_running_loop().time() + call.timeout_seconds
        reply = await self._transport.request(
            "POST",
            self._generations_path,
            headers=call_headers(self._headers, call),
            body=msgspec.json.encode(request_body(call)),
            timeout_seconds=call.timeout_seconds,
            max_body_bytes=self._max_reply_bytes,
        )
        if not 200 <= reply.status < 300:
            raise error_of(reply, self._redactor, prompts_of(call))
        pictures, payloads = _read_reply(reply.body)
        results = [
            await self._artifact(call, index, picture, payloads, deadline)
            for index, picture in enumerate(pictures[: len(call.items)])
        ]
        if not (results and isinstance(results[0], Artifact)) and not any(isinstance(one, Artifact) for one in results):
            reason = next(
                (result.message for result in results if isinstance(result, ItemFailure)), "it holds no picture"
            )
            raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {reason}")
        missing = len(call.items) - len(results)
        return results + missing * [ItemFailure(f"the backend drew {len(results)} of {len(call.items)} pictures")]

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask the configured path, and the model list for what it serves; without a path, the list speaks for health too."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        path = self._health_check_path
        report = await check_path(self._transport, path, self._headers, timeout_seconds) if path else None
        if report is not None and not report.healthy:
            return report
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        listed = await self._check_models(left)
        if report is not None:
            return HealthReport(healthy=True, detail=report.detail, models=listed.models)
        if path:
            detail = f"{path} is not there (HTTP 404), so {listed.detail}"
            return HealthReport(healthy=listed.healthy, detail=detail, models=listed.models)
        return listed

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    async def _check_models(self, timeout_seconds: float) -> HealthReport:
        path = self._models_path
        try:
            reply = await get(self._transport, path, self._headers, timeout_seconds)
        except AttemptError as error:
            return HealthReport(healthy=False, detail=error.message)
        if reply.status in ALIVE_STATUSES:
            return HealthReport(
                healthy=True, detail=f"{path} answered HTTP {reply.status}: there, but it names no models"
            )
        if not 200 <= reply.status < 300:
            return unhealthy(reply, path)
        try:
            models = tuple(dict.fromkeys(model.id for model in _MODELS.decode(reply.body).data))
        except (ValueError, RecursionError):
            return HealthReport(healthy=True, detail=f"{path} answered, but not with a list of models")
        # An empty list is silence rather than a statement: many servers keep the route and never fill it.
        return HealthReport(healthy=True, detail=f"{path} names {len(models)} models", models=models or None)

    async def _artifact(
        self, call: Call, index: int, picture: _Picture, payloads: list[memoryview], deadline: float
    ) -> Artifact | ItemFailure:
        told = picture.seed if type(picture.seed) is int and 0 <= picture.seed < SEED_LIMIT else None
        seed = told if told is not None else call.items[index].seed if call.request.seed_given else None
        revised = picture.revised_prompt if isinstance(picture.revised_prompt, str) else None
        try:
            encoded = payloads[int(picture.b64_json)] if picture.b64_json else b""
            if encoded:  # some servers send both fields, one of them empty
                return artifact_from_base64(encoded, seed, revised)
            if picture.url and picture.url[:5].lower() == "data:":
                return artifact_from_base64(picture.url, seed, revised)
            if picture.url:
                return artifact_from_bytes(await self._get(picture.url, deadline), seed, revised)
        except ValueError as error:
            return ItemFailure(str(error))
        return ItemFailure("not a picture: it has neither b64_json nor url")

    async def _get(self, url: str, deadline: float) -> bytes:
        if self._fetch is None:
            raise ValueError("the picture came as a URL, which is not fetched here")
        left = deadline - asyncio.get_running_loop().time()
        try:
            return await self._fetch(url, left, self._max_reply_bytes)
        except FetchFailed as error:
            if error.is_definite:
                raise ValueError(f"the picture came as a URL: {error.message}") from None
            # The picture exists and may have been paid for, we only could not get at it.
            raise AttemptError(Outcome.UNKNOWN, f"the picture came as a URL: {error.message}") from None


def request_body(call: Call) -> dict[str, Any]:
    """What is sent: the call's own facts, and of the optional parameters only what the client gave."""
    request = call.request
    first = call.items[0]
    body: dict[str, Any] = {"prompt": first.prompt, "n": len(call.items), "size": f"{call.width}x{call.height}"}
    if call.model is not None:
        body["model"] = call.model
    if call.model is None or not _NO_RESPONSE_FORMAT.match(call.model):
        body["response_format"] = "b64_json"
    if request.seed_given:
        body["seed"] = first.seed
    if "negative_prompt" in request.given and first.negative_prompt is not None:
        body["negative_prompt"] = first.negative_prompt
    for name in request.given:
        attribute = HONOURED.get(name)
        value = getattr(request, attribute) if attribute is not None else None
        if value is not None:
            body[name] = value
    return body


def _read_reply(body: bytes | bytearray) -> tuple[list[_Picture], list[memoryview]]:
    """The reply's pictures, whose `b64_json` is an index of the payloads. Raises AttemptError where it is no such reply."""
    try:
        if len(body) <= SMALL_BYTES:
            pictures = _REPLY.decode(body).data
            small: list[memoryview] = []
            for picture in pictures:
                if picture.b64_json:
                    small.append(memoryview(picture.b64_json.encode()))
                    picture.b64_json = str(len(small) - 1)
            return pictures, small
        skeleton, payloads = split_images_json(body)
        if len(skeleton) > SKELETON_BYTES:
            raise ValueError("what is left without its pictures is too large")
        return _REPLY.decode(skeleton).data, payloads
    except (ValueError, RecursionError):
        # what msgspec says would quote the document's paths, not why: the status was 200, so a person has to look
        raise AttemptError(
            Outcome.FAILED, "the backend's reply is no images reply (bad JSON or another shape)"
        ) from None
