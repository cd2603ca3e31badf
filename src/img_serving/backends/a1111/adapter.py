"""The adapter to servers that speak A1111's web API: AUTOMATIC1111, Forge, SD.Next, stable-diffusion.cpp's server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, Final, Literal

import msgspec
import pybase64
from msgspec import Meta, structs

from img_serving.backends.a1111.server import (
    MODELS_PATH,
    OPTIONS_PATH,
    SDCPP_BATCH,
    SDCPP_STEPS,
    A1111Server,
    is_model_list,
    learn,
    read_models,
)
from img_serving.backends.a1111.wire import HONOURED, Info, ProgressPage, read_progress, read_reply, request_body
from img_serving.backends.http import (
    ALIVE_STATUSES,
    MAX_REPLY_BYTES,
    NO_HURRY_SECONDS,
    PROBE_TIMEOUT_SECONDS,
    Headers,
    Redactor,
    call_headers,
    check_path,
    complaint_of,
    error_of,
    get,
    patience,
    prompts_of,
    unhealthy,
)
from img_serving.backends.options import read_options
from img_serving.backends.samplers import sampler_and_schedule
from img_serving.backends.sdcpp import check_length, check_prompt
from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, NotFound, Outcome
from img_serving.domain.images import Artifact, Call, ItemFailure, Preview, Progress
from img_serving.domain.vocabulary import shown
from img_serving.media.masks import white_where_painted
from img_serving.media.sniff import sniff
from img_serving.policy.routing import refusal_of
from img_serving.ports import HealthReport, OnProgress, Transport, UpstreamReply

TEXT_PATH: Final = "/sdapi/v1/txt2img"
IMAGE_PATH: Final = "/sdapi/v1/img2img"
PROGRESS_PATH: Final = "/sdapi/v1/progress"
INTERRUPT_PATH: Final = "/sdapi/v1/interrupt"

ASK_SECONDS: Final = 5.0
"""For a page of progress: a server that is busy with the first step answers late."""

INTERRUPT_SECONDS: Final = 10.0
"""A slot is kept until the interrupt was answered: one that arrived later would stop the next call in its place."""

DEFAULT_BATCH: Final = 4


class A1111Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The table `[backends.a1111]`. `size_multiple` in pixels; unset, the rule is that of the program that was found."""

    size_multiple: Annotated[int, Meta(ge=1, le=256)] | None = None
    size_rounding: Literal["down", "up", "nearest"] | None = None
    progress_interval_seconds: Annotated[float, Meta(ge=0.01, le=60)] = 0.5


@dataclass(frozen=True, slots=True)
class _Plan:
    """How one call is made: the server's own names for what was asked."""

    path: str
    body: dict[str, Any]
    checkpoint: str | None
    sampler: str | None
    schedule: str | None
    options_first: dict[str, Any]


class A1111Backend:
    """Speaks to one endpoint through `transport`. Such a server draws one call at a time: hence one slot by default.

    It takes any name and any size in silence and draws something else: so names are looked up before, sizes rounded here,
    and what its reply says of model, sampler and schedule is compared with what was asked.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        username: str | None = None,
        password: str | None = None,
        headers: Sequence[tuple[str, str]] = (),
        health_check_path: str | None = None,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        max_batch_size: int = DEFAULT_BATCH,
        slots: int = 1,
        shared: bool = False,
        options: Mapping[str, Any] | None = None,
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
            slots: calls in flight at most. Progress and interrupting are the server's, not a call's: with more than one
                nobody knows whose they are.
            shared: whether others use the server too; then what runs there may not be ours either.
            options: of `A1111Options`.

        Raises:
            ValueError: an unknown option, or an impossible value.
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
        self._max_batch_size = max_batch_size
        self._options = read_options(A1111Options, options or {})
        self._is_ours = not shared and slots == 1
        self._shared = shared
        self._clip_skip_is_saved = False
        """Whether the setting stands in the server's file: Forge puts back only what stands there."""
        self._server = A1111Server()
        self._is_known = False
        """Whether the server was asked what it is since it was last known to be down."""
        self._loaded: str | None = None
        """The checkpoint that is loaded, by its own name, where nobody else can have changed it."""
        self._learning = asyncio.Lock()
        self._capabilities = self._able()

    def __repr__(self) -> str:
        return f"<A1111Backend {self._server.program if self._is_known else 'not asked yet'}>"

    @property
    def protocol(self) -> str:
        """Always `a1111`."""
        return "a1111"

    @property
    def capabilities(self) -> Capabilities:
        """One prompt and consecutive seeds per call; names and sizes as the server was found to have them."""
        return self._capabilities

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """One POST for all items; while it runs, the server's page of progress is looked at, where it has one.

        Cancelling closes the connection, which does not stop the engine: so it is interrupted too, if what runs is ours.

        Raises:
            AttemptError: see `error_of`; also `FAILED` where a complete reply holds fewer good pictures than asked for (an
                interrupted server answers 200 with what it has, the last one unfinished, so none of them can be trusted),
                or where another model drew than the one asked for.
            BackendRefusal: the request is at fault.
        """
        if not _fits_one_call(call):
            # Only a batch formed before the protocol was detected comes here.
            raise AttemptError(Outcome.NOT_STARTED, "only one prompt with consecutive seeds fits into one call")
        if not self._is_known:
            await self._learn(min(PROBE_TIMEOUT_SECONDS, call.timeout_seconds))
        plan = await self._plan(call)
        started = False
        try:
            async with patience(call.timeout_seconds) as heard:
                if plan.options_first:
                    await self._set_options(plan.options_first, call)
                    self._clip_skip_is_saved = True
                started = True
                async with self._watched(call, on_progress, heard):
                    reply = await self._transport.request(
                        "POST",
                        plan.path,
                        headers=call_headers(self._headers, call),
                        body=msgspec.json.encode(plan.body),
                        timeout_seconds=NO_HURRY_SECONDS,
                        max_body_bytes=self._max_reply_bytes,
                    )
                if not 200 <= reply.status < 300:
                    raise self._error(reply, call)
                artifacts, info = read_reply(reply.body, call)
                await self._refuse_unfinished()
        except (AttemptError, asyncio.CancelledError) as ending:
            if isinstance(ending, asyncio.CancelledError) or ending.outcome is Outcome.UNKNOWN:
                self._loaded = None
                if started:
                    await self._interrupt()
            raise
        return self._checked(artifacts, info, plan, call)

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask the configured path, and the checkpoints for what it serves; without a path, those speak for health too.

        The first time, and when it was down, it is also asked what it is. None of it touches the GPU.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        path = self._health_check_path
        report = await check_path(self._transport, path, self._headers, timeout_seconds) if path else None
        if report is not None and not report.healthy:
            self._is_known = False
            return report
        listed = await self._check_models(deadline)
        if not listed.healthy:
            self._is_known = False
        elif not (self._is_known and self._server.is_complete):
            self._is_known = False
            with suppress(AttemptError):
                await self._learn(max(0.0, deadline - asyncio.get_running_loop().time()))
        found = self._found()
        if report is not None:
            return HealthReport(healthy=True, detail=report.detail, models=listed.models, found=found)
        if path:
            detail = f"{path} is not there (HTTP 404), so {listed.detail}"
            return HealthReport(healthy=listed.healthy, detail=detail, models=listed.models, found=found)
        return replace(listed, found=found)

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    # what the server is

    async def _learn(self, timeout_seconds: float) -> None:
        """Ask the server what it is, unless somebody did while we waited for our turn. Raises AttemptError `NOT_STARTED`."""
        async with self._learning:
            if self._is_known:
                return
            try:
                async with asyncio.timeout(timeout_seconds):
                    server = await learn(lambda path: get(self._transport, path, self._headers, timeout_seconds))
            except TimeoutError:
                raise AttemptError(Outcome.NOT_STARTED, "the server did not say in time what it has") from None
            except AttemptError as error:
                # nothing was to be drawn yet, so whatever went wrong, trying elsewhere is free of risk
                raise AttemptError(Outcome.NOT_STARTED, error.message) from None
            self._server = server
            self._is_known = True
            self._clip_skip_is_saved = False
            loaded = server.loaded
            self._loaded = server.models.find(loaded) if loaded is not None and server.models is not None else None
            self._capabilities = self._able()

    def _able(self) -> Capabilities:
        server, options = self._server, self._options
        sizes: SizeRule = server.sizes
        if options.size_multiple is not None:
            sizes = replace(sizes, multiple=options.size_multiple)
        if options.size_rounding is not None:
            sizes = replace(sizes, rounding=options.size_rounding)
        watches = self._is_ours and server.has_progress
        # one that was asked and has no list of them is older than the parameter
        schedules = () if self._is_known and server.schedulers is None and server.is_complete else ("scheduler",)
        return Capabilities(
            operations=frozenset({"generation", "edit", "variation"}),
            batch="seeds",
            max_batch_size=min(self._max_batch_size, SDCPP_BATCH) if server.is_sdcpp else self._max_batch_size,
            max_concurrency=1,
            honours=frozenset({"seed", "negative_prompt", "size", "clip_skip", "sampler", *HONOURED, *schedules}),
            sizes=sizes,
            max_steps=SDCPP_STEPS if server.is_sdcpp else None,
            masks=True,
            samplers=server.samplers,
            schedulers=server.schedulers,
            formats=("png",),
            progress=watches,
            previews=watches,
            cancels=watches,
            switches_models=server.can_switch,
        )

    def _found(self) -> str:
        server = self._server
        if not self._is_known:
            return ""
        return f"{server.program} ({server.because})" if server.because else server.program

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
        if not is_model_list(reply):
            return HealthReport(healthy=False, detail=f"{MODELS_PATH} answered, but not with a list of models")
        models = read_models(reply)
        if self._is_known and models != self._server.models:
            self._server = replace(self._server, models=models)
        names = () if models is None else models.names
        detail = f"{MODELS_PATH} names {len(names)} model{'s'[: len(names) != 1]}"
        return HealthReport(healthy=True, detail=detail, models=names or None)

    # one call

    async def _plan(self, call: Call) -> _Plan:
        request, server = call.request, self._server
        # routing has refused what cannot be, unless it decided before the server was known
        refused = refusal_of(request, self._capabilities)
        if refused is None and (reason := self._capabilities.sizes.refusal(call.width, call.height)) is not None:
            refused = f"the picture is {call.width}x{call.height}: {reason}; ask for a size", "image"
        if refused is not None:
            raise BackendRefusal(InvalidRequest(refused[0], code="unsupported", param=refused[1]))
        if server.is_sdcpp:
            for name, text in (
                ("prompt", call.items[0].prompt),
                ("negative_prompt", call.items[0].negative_prompt or ""),
            ):
                check_length(name, text)
                check_prompt(text)
        sampler, schedule = sampler_and_schedule(request.sampler, request.scheduler, server.samplers, server.schedulers)
        checkpoint = await self._checkpoint(call.model)
        must_load = checkpoint is not None and not (self._is_ours and checkpoint == self._loaded)
        clip_skip = request.clip_skip
        options_first: dict[str, Any] = {}
        if clip_skip is not None and server.has_options and not server.is_sdcpp:
            if not self._clip_skip_is_saved:
                options_first["CLIP_stop_at_last_layers"] = server.clip_skip or 1
            if must_load and not self._shared:
                # all settings of a call are put back after it, or none: the model is to stay
                options_first["sd_model_checkpoint"] = checkpoint
                must_load = False
        mask = None
        if request.mask is not None:
            try:
                # Forge repaints everything where a mask leaves nothing to paint, stable-diffusion.cpp nothing
                mask = await asyncio.to_thread(white_where_painted, request.mask.data, needs_area=True)
            except ValueError as error:
                raise BackendRefusal(InvalidRequest(str(error), param="mask")) from None
        body = request_body(
            call,
            self._capabilities.sizes.fit(call.width, call.height),
            sampler=sampler,
            schedule=schedule,
            checkpoint=checkpoint if must_load else None,
            clip_skip=clip_skip,
            restore=self._shared or clip_skip is not None,
            mask=mask,
            one_by_one=self._shows_each(call),
            is_sdcpp=server.is_sdcpp,
        )
        path = IMAGE_PATH if request.images else TEXT_PATH
        return _Plan(path, body, checkpoint, sampler, schedule, options_first)

    async def _checkpoint(self, model: str | None) -> str | None:
        """The server's own name of a model; None: whatever it has. Raises BackendRefusal where it has no such thing."""
        known = self._server.models
        if model is None or known is None:
            return model
        found = known.find(model)
        if found is None and not self._server.can_switch:
            return None  # it has one, whatever the operator calls it
        if found is None:
            # it may have come since the last check
            known = read_models(await get(self._transport, MODELS_PATH, self._headers, ASK_SECONDS)) or known
            self._server = replace(self._server, models=known)
            found = known.find(model)
        if found is None:
            has = ", ".join(shown(name) for name in known.names[:10]) + (", …" if len(known.names) > 10 else "")
            message = f"the server has no checkpoint {shown(model)!r}, and would draw with another one (it has: {has})"
            raise BackendRefusal(NotFound(message, code="model_not_found", param="model"))
        return found

    async def _set_options(self, options: dict[str, Any], call: Call) -> None:
        """Change the server's settings; it saves them, and loads a model with the next drawing. Raises as `error_of` says."""
        reply = await self._transport.request(
            "POST",
            OPTIONS_PATH,
            headers=call_headers(self._headers, call),
            body=msgspec.json.encode(options),
            timeout_seconds=NO_HURRY_SECONDS,
            max_body_bytes=self._max_reply_bytes,
        )
        if not 200 <= reply.status < 300:
            raise self._error(reply, call)

    def _checked(self, artifacts: list[Artifact], info: Info, plan: _Plan, call: Call) -> list[Artifact]:
        """Compare what drew with what was asked for. Raises AttemptError where it was another model."""
        server = self._server
        drew = info.model
        if drew is not None and server.models is not None:
            own = server.models.find(drew)
            self._loaded = own
            if plan.checkpoint is not None and own is not None and own != plan.checkpoint:
                raise AttemptError(
                    Outcome.FAILED, f"the server drew with {shown(own)!r} instead of {shown(plan.checkpoint)!r}"
                )
        elif plan.checkpoint is not None:
            self._loaded = plan.checkpoint
        ignored = []
        if any(one.seed != item.seed for one, item in zip(artifacts, call.items, strict=True)):
            ignored.append("seed")
        if plan.sampler is not None and info.sampler is not None and server.samplers is not None:
            used, _ = sampler_and_schedule(info.sampler, None, server.samplers, server.schedulers)
            if used != plan.sampler:
                ignored.append("sampler")
        schedules = server.schedulers
        if plan.schedule is not None and info.schedule is not None and schedules is not None:
            ignored += ["scheduler"] * (schedules.find(info.schedule) != plan.schedule)
        return [structs.replace(one, ignored=tuple(ignored)) for one in artifacts] if ignored else artifacts

    # what happens on the server meanwhile

    @asynccontextmanager
    async def _watched(self, call: Call, on_progress: OnProgress, heard: Callable[[], None]) -> AsyncIterator[None]:
        """Look at the server's progress for as long as the block lasts."""
        if not self._capabilities.progress:
            yield
            return
        watching = asyncio.create_task(self._watch(call, on_progress, heard), name="a1111 progress")
        try:
            yield
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    def _shows_each(self, call: Call) -> bool:
        """Whether the pictures are drawn one after the other, so that what the server shows is one of them."""
        return call.previews and self._capabilities.previews and len(call.items) > 1

    async def _watch(self, call: Call, on_progress: OnProgress, heard: Callable[[], None]) -> None:
        furthest, shown, drawing = 0, "", 0
        while True:
            await asyncio.sleep(self._options.progress_interval_seconds)
            page = await self._page(previews=call.previews)
            if page is None:
                continue
            done, total = page.steps()
            preview = None
            index = min(max(0, page.state.job_no), len(call.items) - 1) if self._shows_each(call) else 0
            if call.previews and page.current_image and page.current_image != shown:
                shown = page.current_image
                # at the beginning of a picture the server still shows the end of the one before
                preview = _preview(shown, index, page.share()) if index == drawing else None
            drawing = index
            if done > furthest:
                # steps that have not grown are no sign of life
                furthest = done
                heard()
            elif preview is None:
                continue
            if done:
                on_progress(Progress(done, total, preview))

    async def _page(self, *, previews: bool) -> ProgressPage | None:
        path = f"{PROGRESS_PATH}?skip_current_image={'false' if previews else 'true'}"
        try:
            reply = await self._transport.request(
                "GET",
                path,
                headers=self._headers,
                timeout_seconds=ASK_SECONDS,
                max_body_bytes=self._max_reply_bytes,
            )
        except AttemptError:
            return None
        return read_progress(reply.body) if 200 <= reply.status < 300 else None

    async def _refuse_unfinished(self) -> None:
        """Somebody at the server's own page may have interrupted it: then it answers 200 with an unfinished picture."""
        if not self._capabilities.cancels:
            return
        page = await self._page(previews=False)
        if page is not None and (page.state.interrupted or page.state.stopping_generation):
            raise AttemptError(Outcome.FAILED, "somebody interrupted the server: its picture is unfinished")

    async def _interrupt(self) -> None:
        """Stop what runs, if it is ours and can be stopped. What the server then answers goes to a closed connection."""
        if not self._capabilities.cancels:
            return
        with suppress(AttemptError):
            await self._transport.request(
                "POST",
                INTERRUPT_PATH,
                headers=self._headers,
                timeout_seconds=INTERRUPT_SECONDS,
                max_body_bytes=self._max_reply_bytes,
            )

    def _error(self, reply: UpstreamReply, call: Call) -> AttemptError | BackendRefusal:
        if reply.status == 404:
            # A1111 answers an unknown sampler, or checkpoint, as if the route were not there.
            said = complaint_of(reply, self._redactor, prompts_of(call)).message
            if "sampler" in said.lower() and call.request.sampler is not None:
                return BackendRefusal(InvalidRequest(said, param="sampler"))
            if said.lower() == "model not found":
                return BackendRefusal(NotFound(said, code="model_not_found", param="model"))
        return error_of(reply, self._redactor, prompts_of(call))


def _fits_one_call(call: Call) -> bool:
    first = call.items[0]
    return all(
        (item.prompt, item.negative_prompt) == (first.prompt, first.negative_prompt) for item in call.items
    ) and all(after.seed == before.seed + 1 for before, after in pairwise(call.items))


def _preview(text: str, index: int, share: float | None) -> Preview | None:
    """An unfinished picture as the page of progress has it; None for anything that is no picture."""
    try:
        data = pybase64.b64decode(text.rpartition(",")[2], validate=True)
    except ValueError:
        return None
    media_type = sniff(data)
    return None if media_type is None else Preview(data, media_type, index, share)
