"""The adapter to servers that speak A1111's web API: AUTOMATIC1111, Forge, SD.Next, stable-diffusion.cpp's server."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Final

import msgspec
import pybase64

from img_serving.backends.http import (
    ALIVE_STATUSES,
    MAX_REPLY_BYTES,
    Headers,
    Redactor,
    call_headers,
    check_path,
    complaint_of,
    error_of,
    get,
    prompts_of,
    unhealthy,
)
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import SEED_LIMIT, Artifact, Call, ItemFailure
from img_serving.media.payload import artifact_from_base64
from img_serving.media.scan import SKELETON_BYTES, split_string_list_json
from img_serving.ports import HealthReport, OnProgress, Transport, UpstreamReply

GENERATE_PATH: Final = "/sdapi/v1/txt2img"
MODELS_PATH: Final = "/sdapi/v1/sd-models"
OPTIONS_PATH: Final = "/sdapi/v1/options"

HONOURED: Final = {
    "num_inference_steps": ("steps", "steps"),
    "guidance_scale": ("guidance_scale", "cfg_scale"),
    "sampler": ("sampler", "sampler_name"),
    "scheduler": ("scheduler", "scheduler"),
}
"""Parameters, the field of `ImageRequest` that holds each, and its name in this protocol."""


class _Reply(msgspec.Struct):
    images: list[str] | None = None
    info: Any = None


class _Info(msgspec.Struct):
    """What `info` (a JSON document inside a string) tells that we use."""

    all_seeds: list[int] | None = None
    index_of_first_image: int = 0


class _Checkpoint(msgspec.Struct):
    title: str | None = None
    model_name: str | None = None


_REPLY = msgspec.json.Decoder(_Reply)
_INFO = msgspec.json.Decoder(_Info)
_CHECKPOINTS = msgspec.json.Decoder(list[_Checkpoint])


class A1111Backend:
    """Speaks to one endpoint through `transport`. Such a server draws one call at a time: hence one slot by default."""

    def __init__(
        self,
        transport: Transport,
        *,
        username: str | None = None,
        password: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        health_check_path: str | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        max_batch_size: int = 4,
    ) -> None:
        """Describe the endpoint.

        Args:
            transport: HTTP to the endpoint; closed by `close`.
            username: for HTTP Basic, as A1111's `--api-auth` wants it; None sends none.
            password: goes with `username`.
            headers: sent with every request.
            health_check_path: asked instead of the model list to learn about health.
            max_reply_bytes: the largest reply.
            max_batch_size: pictures in one call, a matter of the card's memory.
        """
        self._transport = transport
        self._headers: Headers = tuple(headers)
        secrets = [password, *(value for _, value in headers)]
        if username is not None:
            basic = pybase64.b64encode(f"{username}:{password or ''}".encode()).decode()
            self._headers += (("Authorization", f"Basic {basic}"),)
            secrets.append(basic)
        self._redactor = Redactor(secrets)
        self._health_check_path = health_check_path
        self._max_reply_bytes = max_reply_bytes
        self._capabilities = Capabilities(
            batch="seeds",
            max_batch_size=max_batch_size,
            max_concurrency=1,
            switches_models=True,
            honours=frozenset({"seed", "negative_prompt", "size", "clip_skip", *HONOURED}),
        )

    @property
    def protocol(self) -> str:
        """Always `a1111`."""
        return "a1111"

    @property
    def capabilities(self) -> Capabilities:
        """One prompt and consecutive seeds per call."""
        return self._capabilities

    async def generate(
        self,
        call: Call,
        on_progress: OnProgress,  # noqa: ARG002 - the protocol tells nothing before the reply
    ) -> Sequence[Artifact | ItemFailure]:
        """One POST for all items. Cancelling closes its connection.

        Raises:
            AttemptError: see `error_of`; also `FAILED` where a complete reply holds fewer good pictures than asked for: an
                interrupted server answers 200 with what it has, the last one unfinished, so none of them can be trusted.
            BackendRefusal: the request is at fault.
        """
        if not _fits_one_call(call):
            # Only a batch formed before the protocol was detected comes here.
            raise AttemptError(Outcome.NOT_STARTED, "only one prompt with consecutive seeds fits into one call")
        reply = await self._transport.request(
            "POST",
            GENERATE_PATH,
            headers=call_headers(self._headers, call),
            body=msgspec.json.encode(request_body(call)),
            timeout_seconds=call.timeout_seconds,
            max_body_bytes=self._max_reply_bytes,
        )
        if not 200 <= reply.status < 300:
            raise self._error(reply, call)
        return _artifacts(reply.body, call)

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask the configured path, and the checkpoints for what it serves; without a path, those speak for health too."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        path = self._health_check_path
        report = await check_path(self._transport, path, self._headers, timeout_seconds) if path else None
        if report is not None and not report.healthy:
            return report
        listed = await self._check_models(deadline)
        if report is not None:
            return HealthReport(healthy=True, detail=report.detail, models=listed.models)
        if path:
            detail = f"{path} is not there (HTTP 404), so {listed.detail}"
            return HealthReport(healthy=listed.healthy, detail=detail, models=listed.models)
        return listed

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    async def _check_models(self, deadline: float) -> HealthReport:
        clock = asyncio.get_running_loop().time
        try:
            reply = await get(self._transport, MODELS_PATH, self._headers, max(0.0, deadline - clock()))
            if reply.status == 404:
                # older and smaller servers have the options but not this list
                reply = await get(self._transport, OPTIONS_PATH, self._headers, max(0.0, deadline - clock()))
                if 200 <= reply.status < 300:
                    return HealthReport(healthy=True, detail=f"{OPTIONS_PATH} answered; there is no list of models")
                return unhealthy(reply, OPTIONS_PATH)
        except AttemptError as error:
            return HealthReport(healthy=False, detail=error.message)
        if reply.status in ALIVE_STATUSES:
            return HealthReport(
                healthy=True, detail=f"{MODELS_PATH} answered HTTP {reply.status}: there, without models"
            )
        if not 200 <= reply.status < 300:
            return unhealthy(reply, MODELS_PATH)
        try:
            found = [one.model_name or one.title for one in _CHECKPOINTS.decode(reply.body)]
        except (ValueError, RecursionError):
            return HealthReport(healthy=False, detail=f"{MODELS_PATH} answered, but not with a list of models")
        models = tuple(dict.fromkeys(name for name in found if name))
        return HealthReport(healthy=True, detail=f"{MODELS_PATH} names {len(models)} models", models=models or None)

    def _error(self, reply: UpstreamReply, call: Call) -> AttemptError | BackendRefusal:
        if reply.status == 404 and call.request.sampler is not None:
            # A1111 answers an unknown sampler as if the route were not there.
            complaint = complaint_of(reply, self._redactor, prompts_of(call))
            if "sampler" in complaint.message.lower():
                return BackendRefusal(InvalidRequest(complaint.message, param="sampler"))
        return error_of(reply, self._redactor, prompts_of(call))


def request_body(call: Call) -> dict[str, Any]:
    """What is sent: the call's own facts, and of the optional parameters only what the client gave."""
    request = call.request
    first = call.items[0]
    body: dict[str, Any] = {
        "prompt": first.prompt,
        "negative_prompt": first.negative_prompt or "",
        "seed": first.seed,
        "width": call.width,
        "height": call.height,
        "batch_size": len(call.items),
        "n_iter": 1,
        "send_images": True,
        "save_images": False,
    }
    for attribute, name in HONOURED.values():
        value = getattr(request, attribute)
        if value is not None:
            body[name] = value
    overrides: dict[str, Any] = {}
    if call.model is not None:
        overrides["sd_model_checkpoint"] = call.model
    if request.clip_skip is not None:
        overrides["CLIP_stop_at_last_layers"] = request.clip_skip
    if overrides:
        body["override_settings"] = overrides
    return body


def _fits_one_call(call: Call) -> bool:
    first = call.items[0]
    return all(
        (item.prompt, item.negative_prompt) == (first.prompt, first.negative_prompt) for item in call.items
    ) and all(after.seed == before.seed + 1 for before, after in pairwise(call.items))


def _artifacts(body: bytes | bytearray, call: Call) -> list[Artifact]:
    """The pictures of a complete reply, one an item. Raises AttemptError."""
    try:
        skeleton, payloads = split_string_list_json(body)
        if len(skeleton) > SKELETON_BYTES:
            raise ValueError("what is left without its pictures is too large")
        reply = _REPLY.decode(skeleton)
    except (ValueError, RecursionError):
        raise AttemptError(
            Outcome.FAILED, "the backend's reply is no txt2img reply (bad JSON or another shape)"
        ) from None
    info = _info(reply.info)
    wanted = len(call.items)
    # A contact sheet of the whole batch may come first (an option of the server), and helper pictures may come last.
    start = max(0, info.index_of_first_image)
    images = (reply.images or [])[start : start + wanted]
    if len(images) < wanted:
        raise AttemptError(Outcome.FAILED, f"the backend drew {len(images)} of {wanted} pictures")
    seeds = _seeds(info, call)
    try:
        return [artifact_from_base64(payloads[int(image)], seed) for image, seed in zip(images, seeds, strict=True)]
    except ValueError as error:
        raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None


def _info(info: Any) -> _Info:
    """`info` is a note about pictures that are there already: one that cannot be read must not cost them."""
    try:
        return _INFO.decode(info) if isinstance(info, str) else msgspec.convert(info or {}, _Info)
    except (ValueError, RecursionError):
        return _Info()


def _seeds(info: _Info, call: Call) -> list[int]:
    told = info.all_seeds or []
    asked = [item.seed for item in call.items]
    told = told[: len(asked)]
    return told if len(told) == len(asked) and all(0 <= seed < SEED_LIMIT for seed in told) else asked
