"""The adapter to servers that speak OpenAI's Images API: hosted ones, LocalAI, vLLM-Omni, SGLang and many more."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Final

from msgspec.structs import replace as structs_replace

from img_serving.backends.http import (
    ALIVE_STATUSES,
    MAX_REPLY_BYTES,
    NO_HURRY_SECONDS,
    PROBE_TIMEOUT_SECONDS,
    Headers,
    Redactor,
    call_headers,
    check_path,
    error_in_stream,
    error_of,
    get,
    patience,
    prompts_of,
    unhealthy,
)
from img_serving.backends.openai.body import Draft, draft, draft_edit, draft_variation, partial_images
from img_serving.backends.openai.detect import (
    NO_NAMES,
    Finding,
    Model,
    ask,
    by_host,
    by_models,
    names_of,
    read_models,
    sdcpp_names,
)
from img_serving.backends.openai.options import AUTO, read_openai_options
from img_serving.backends.openai.presets import OPENAI_MODELS, PRESETS, Preset
from img_serving.backends.openai.reply import Picture, Reply, StreamedReply, read_reply
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import SEED_LIMIT, Artifact, Call, ItemFailure
from img_serving.media.payload import artifact_from_base64, artifact_from_bytes
from img_serving.ports import HealthReport, OnProgress, Transport, UpstreamReply
from img_serving.transport.fetch import FetchFailed, UrlFetcher

STREAM_END_SECONDS = 0.25
"""How long a stream may take to end once its picture is there: an ended one leaves a connection that can be used again."""

MAX_SPOKEN: Final = 256
"""Models whose dialect is remembered."""

_NOTHING: Final[frozenset[str]] = frozenset()
_QUALITIES = frozenset({"low", "medium", "high", "xhigh", "max"})
"""Those that a reply may tell apart: `auto`, and the words of older models, become one of them."""


class OpenAIBackend:
    """Speaks to one endpoint through `transport`, whose base URL holds any path prefix.

    Until it is known which dialect is spoken there, the first call or check finds out; what is found holds until a check fails.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        options: Mapping[str, Any] | None = None,
        url: str = "",
        api_key: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        base_has_v1: bool = False,
        health_check_path: str | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        fetch: UrlFetcher | None = None,
        secrets: Sequence[str] = (),
        models: Sequence[str] = (),
    ) -> None:
        """Describe the endpoint.

        Args:
            transport: HTTP to the endpoint; closed by `close`.
            options: the operator's table, see `OpenAIOptions`.
            url: where the endpoint is: some hosts speak a dialect that is known beforehand.
            api_key: sent as a bearer; its presence says that somebody pays for pictures.
            headers: sent with every request.
            base_has_v1: whether the transport's base URL is the API's root already (`…/v1`).
            health_check_path: asked instead of the model list to learn about health.
            secrets: what else must never be quoted (a password that `headers` hold in another form).
            max_reply_bytes: the largest reply, and the largest picture behind a URL.
            fetch: gets pictures that come as URLs; None refuses them.
            models: names that the operator gave, beside those that the server tells.

        Raises:
            ValueError: an option is wrong; the message names it.
        """
        self._transport = transport
        self._headers: Headers = (*headers, *((("Authorization", f"Bearer {api_key}"),) if api_key else ()))
        root = "" if base_has_v1 else "/v1"
        self._images_path = f"{root}/images"
        self._models_path = f"{root}/models"
        self._health_check_path = health_check_path
        self._max_reply_bytes = max_reply_bytes
        self._fetch = fetch
        self._redactor = Redactor([api_key, *secrets, *(value for _, value in headers)])
        self._options = read_openai_options(options or {})
        told = self._options.preset
        self._fixed = Finding(told, "as configured") if told != AUTO else by_host(url)
        self._found: Finding | None = self._fixed
        self._asking = asyncio.Lock()
        self._asked: tuple[str, ...] | None = None
        self._models: tuple[str, ...] = ()
        self._named = tuple(models)
        self._names = NO_NAMES
        self._settle()

    def __repr__(self) -> str:
        return f"<OpenAIBackend {self._found or 'not asked yet'}>"

    @property
    def protocol(self) -> str:
        """Always `openai`."""
        return "openai"

    @property
    def capabilities(self) -> Capabilities:
        """Those of the dialect that is spoken; what the server makes of a parameter, it does not tell."""
        return self._capabilities

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """One POST for all items. Cancelling closes its connection, which is all the cancellation that the protocol has.

        Pictures that are missing or broken beside good ones are `ItemFailure`s: only they are drawn, and paid for, again.
        Where unfinished pictures are wanted and can be had, one picture is asked for as a stream: with several, the protocol
        cannot say whose a part is.

        Raises:
            AttemptError: see `error_of`; also `FAILED` where a complete reply holds no good picture, and `UNKNOWN` where a
                stream ends without one.
            BackendRefusal: the request is at fault.
        """
        deadline = asyncio.get_running_loop().time() + call.timeout_seconds
        if self._found is None:
            await self._find_out(min(call.timeout_seconds, PROBE_TIMEOUT_SECONDS))
        preset = self._spoken.get(call.model) or self._spoken_to(call.model)
        edits = preset.edits
        # Only what was routed or batched before the dialect was known is refused here.
        if (lacking := _lacking(call, preset)) is not None:
            raise BackendRefusal(InvalidRequest(lacking, code="unsupported", param="model"))
        if (reason := _unfit(call, preset)) is not None:
            raise AttemptError(Outcome.NOT_STARTED, reason)
        varies = call.request.operation == "variation"
        stream = call.previews and preset.stream and len(call.items) == 1 and not varies
        if varies:
            letter = draft_variation(call, preset, self._names)
        elif edits is None or call.request.operation != "edit":
            letter = draft(call, preset, self._names, stream=stream)
        else:
            letter = await draft_edit(call, preset, edits, self._names, stream=stream)
        if stream:
            reply = await self._streamed(call, letter, on_progress)
            deadline = asyncio.get_running_loop().time() + call.timeout_seconds
        else:
            reply = read_reply((await self._post(call, letter, call.timeout_seconds)).body)
        results = [
            await self._artifact(call, preset, index, reply, deadline)
            for index in range(min(len(call.items), len(reply.pictures)))
        ]
        if not (results and isinstance(results[0], Artifact)) and not any(isinstance(one, Artifact) for one in results):
            reason = next(
                (result.message for result in results if isinstance(result, ItemFailure)), "it holds no picture"
            )
            raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {reason}")
        if ignored := letter.ignored.union(_not_honoured(call, reply)):
            names = tuple(sorted(ignored))
            results = [structs_replace(one, ignored=names) if isinstance(one, Artifact) else one for one in results]
        missing = len(call.items) - len(results)
        return results + missing * [ItemFailure(f"the backend drew {len(results)} of {len(call.items)} pictures")]

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask the configured path, and the model list for what it serves; without a path, the list speaks for health too."""
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        path = self._health_check_path
        report = await check_path(self._transport, path, self._headers, timeout_seconds) if path else None
        if report is not None and not report.healthy:
            self._asked = None  # something else may be there when it is back
            return report
        left = max(0.0, deadline - asyncio.get_running_loop().time())
        listed = await self._check_models(left)
        if report is not None:
            return replace(listed, healthy=True, detail=report.detail)
        if path:
            return replace(listed, detail=f"{path} is not there (HTTP 404), so {listed.detail}")
        return listed

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    async def _check_models(self, timeout_seconds: float) -> HealthReport:
        path = self._models_path
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        try:
            reply = await get(self._transport, path, self._headers, timeout_seconds)
        except AttemptError as error:
            self._asked = None
            return HealthReport(healthy=False, detail=error.message)
        if reply.status in ALIVE_STATUSES:
            detail = f"{path} answered HTTP {reply.status}: there, but it names no models"
            await self._look_at(reply, [], deadline)
            return HealthReport(healthy=True, detail=detail, found=str(self._found), faults=self._doubts(detail))
        if not 200 <= reply.status < 300:
            self._asked = None
            return unhealthy(reply, path)
        models = read_models(reply)
        await self._look_at(reply, models or [], deadline)
        if models is None:
            detail = f"{path} answered, but not with a list of models"
            return HealthReport(healthy=True, detail=detail, found=str(self._found), faults=self._doubts(detail))
        # An empty list is silence rather than a statement: many servers keep the route and never fill it.
        named = self._models
        detail = f"{path} names {len(named)} model{'s'[: len(named) != 1]}"
        return HealthReport(healthy=True, detail=detail, models=named or None, found=str(self._found))

    def _doubts(self, detail: str) -> tuple[str, ...]:
        """That nothing shows what speaks there: small servers have no list of models, but a wrong address looks the same."""
        if self._found is None or self._found.family != "generic" or self._fixed is not None:
            return ()
        return (f"nothing shows that OpenAI's API is spoken there ({detail}): make sure that the address is right",)

    # which dialect

    async def _find_out(self, timeout_seconds: float) -> None:
        """Before the first call, if no check was there before it.

        Raises:
            AttemptError: `NOT_STARTED`: it is out of order, or does not answer. Nothing is sent to who knows what.
        """
        async with self._asking:
            if self._found is None:
                report = await self._check_models(timeout_seconds)
                if self._found is None:
                    raise AttemptError(Outcome.NOT_STARTED, report.detail)

    async def _look_at(self, reply: UpstreamReply, models: list[Model], deadline: float) -> None:
        """Learn from a list of models what is spoken; further questions are asked once for each new list."""
        clock = asyncio.get_running_loop().time
        ids = tuple(model.id for model in models)
        if self._asked == ids:
            return
        found = self._fixed or by_models(reply, models)
        names = NO_NAMES
        asked: tuple[str, ...] | None = ids
        try:
            if found is None:
                found = await ask(self._transport, self._headers, models, max(0.0, deadline - clock()))
            if found is not None and found.family == "sdcpp":
                names = await sdcpp_names(self._transport, self._headers, max(0.0, deadline - clock()))
        except AttemptError:
            asked = None  # it has no time for questions now: they are asked again at the next check
        self._found = found or Finding("generic", "nothing tells it from others")
        self._names = names
        self._models = names_of(models, self._found.family)
        self._asked = asked
        self._settle()

    def _settle(self) -> None:
        """Put together what is known: the dialect, the operator's word on top, and the models that differ."""
        family = self._found.family if self._found else "generic"
        self._preset: Preset = self._options.over(PRESETS[family])
        self._spoken: dict[str | None, Preset] = {}
        usual = self._preset.capabilities()
        if self._found is None:
            # it may be any of them: what it cannot do is known before anything is sent
            usual = replace(usual, operations=frozenset({"generation", "edit", "variation"}), masks=True, max_images=16)
        names = {*self._models, *self._named, *(OPENAI_MODELS if family == "openai" else ())}
        variants = {name: self._preset.of(name).capabilities() for name in sorted(names)}
        self._capabilities = replace(
            usual,
            samplers=self._names.samplers,
            schedulers=self._names.schedulers,
            variants={name: able for name, able in variants.items() if able != usual},
        )

    # one call

    def _spoken_to(self, model: str | None) -> Preset:
        """The dialect of a model, remembered."""
        preset = self._preset.of(model)
        if len(self._spoken) < MAX_SPOKEN:
            self._spoken[model] = preset
        return preset

    async def _post(
        self, call: Call, letter: Draft, timeout_seconds: float, stream: StreamedReply | None = None
    ) -> UpstreamReply:
        """Send it, and take the reply if it is a good one."""
        reply = await self._transport.request(
            "POST",
            f"{self._images_path}/{letter.route}",
            headers=call_headers(self._headers, call, letter.content_type),
            body=letter.body,
            timeout_seconds=timeout_seconds,
            max_body_bytes=self._max_reply_bytes,
            on_event_bytes=None if stream is None else stream.feed,
        )
        if not 200 <= reply.status < 300:
            raise error_of(reply, self._redactor, prompts_of(call))
        return reply

    async def _streamed(self, call: Call, letter: Draft, on_progress: OnProgress) -> Reply:
        """The reply to a call that asked for a stream, which is an ordinary one where the server knows of no streams."""
        stream: StreamedReply | None = None
        try:
            async with patience(call.timeout_seconds) as heard:
                stream = StreamedReply(on_progress, heard, self._max_reply_bytes, partials=partial_images(call))
                whole = await self._until_finished(call, letter, stream)
        except AttemptError:
            # neither a picture nor a reason that is there is lost by how the connection ends
            if stream is None or not (stream.reply.pictures or stream.error):
                raise
        else:
            if whole is not None:
                if not whole.headers.get("content-type", "").lower().startswith("text/event-stream"):
                    return read_reply(whole.body)
                stream.finish()
        if stream.reply.pictures:
            return stream.reply
        if stream.error is not None:
            raise error_in_stream(stream.error, self._redactor, prompts_of(call)) from None
        if stream.fault is not None:
            raise AttemptError(Outcome.FAILED, stream.fault)
        raise AttemptError(Outcome.UNKNOWN, "the backend's stream ended without a finished picture")

    async def _until_finished(self, call: Call, letter: Draft, stream: StreamedReply) -> UpstreamReply | None:
        """The reply; None where its picture is there and it does not end: some servers leave the stream open."""
        posting = asyncio.ensure_future(self._post(call, letter, NO_HURRY_SECONDS, stream))
        finishing = asyncio.ensure_future(stream.finished.wait())
        try:
            await asyncio.wait({posting, finishing}, return_when=asyncio.FIRST_COMPLETED)
            if not posting.done():
                await asyncio.wait({posting}, timeout=STREAM_END_SECONDS)
            return posting.result() if posting.done() else None
        finally:
            for task in (posting, finishing):
                task.cancel()
            await asyncio.gather(posting, finishing, return_exceptions=True)

    async def _artifact(
        self, call: Call, preset: Preset, index: int, reply: Reply, deadline: float
    ) -> Artifact | ItemFailure:
        picture = reply.pictures[index]
        seed = _seed_of(call, preset, index, picture)
        revised = picture.revised_prompt if isinstance(picture.revised_prompt, str) else None
        try:
            encoded = reply.payloads[int(picture.b64_json)] if picture.b64_json else b""
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


def _lacking(call: Call, preset: Preset) -> str | None:
    """What is asked for that the dialect does not have at all; None where it has everything."""
    request, edits = call.request, preset.edits
    if request.operation == "generation":
        return None
    if request.operation == "variation":
        if preset.variations is None:
            return "this server has no variations"
        return None if len(request.images) == 1 else "a variation starts from one picture"
    if edits is None:
        return f"this server has no {request.operation}s"
    if request.mask is not None and not edits.mask:
        return "this server does not look at masks"
    if len(request.images) > edits.max_images:
        return f"this server takes at most {edits.max_images} input pictures"
    return None


def _unfit(call: Call, preset: Preset) -> str | None:
    """Why one call cannot say it; None if it can. Several pictures share a seed, or have consecutive ones if it counts on."""
    request, items = call.request, call.items
    if len(items) == 1:
        return None
    if len(items) > preset.max_n:
        return f"this model draws {preset.max_n} pictures a call"
    if preset.batch == "seeds":
        first = items[0]
        same = all((one.prompt, one.negative_prompt) == (first.prompt, first.negative_prompt) for one in items)
        if same and all(after.seed == before.seed + 1 for before, after in pairwise(items)):
            return None
    elif not request.seed_given:
        return None
    return "pictures with seeds of their own take one call each"


def _seed_of(call: Call, preset: Preset, index: int, picture: Picture) -> int | None:
    """What the server says, else what it was told; None where nobody knows."""
    if type(picture.seed) is int and 0 <= picture.seed < SEED_LIMIT:
        return picture.seed
    if "seed" not in preset.names(call.request.operation):
        return None
    if preset.batch == "seeds" and preset.always_seed:
        return call.items[index].seed
    told = call.request.seed_given or preset.always_seed
    return call.items[index].seed if told and (index == 0 or call.request.seed_given) else None


def _not_honoured(call: Call, reply: Reply) -> frozenset[str]:
    """What the reply itself says was done otherwise than asked for."""
    if reply.background is None and reply.quality is None:
        return _NOTHING
    request = call.request
    lost = set()
    if request.background == "transparent" and reply.background == "opaque":
        lost.add("background")
    told = reply.quality if isinstance(reply.quality, str) else None
    if told != request.quality and {request.quality, told} <= _QUALITIES:
        lost.add("quality")
    return frozenset(lost)
