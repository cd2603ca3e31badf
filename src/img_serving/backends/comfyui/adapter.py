"""The adapter to ComfyUI: one call is one prompt, followed over a websocket where there is one and in the history always."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final
from uuid import uuid4

import msgspec
import pybase64

from img_serving.backends.comfyui import replies
from img_serving.backends.comfyui.built_in import MAX_STEPS, built_in
from img_serving.backends.comfyui.events import News
from img_serving.backends.comfyui.fitness import checkpoint_file, classes_of, misfit
from img_serving.backends.comfyui.prompt import MAX_ANSWER_BYTES, PROMPT_PATH, ComfyUIPrompts, Pace
from img_serving.backends.comfyui.replies import NotComfyUI, not_comfyui
from img_serving.backends.comfyui.server import MODELS_SECONDS, STATS_PATH, ComfyUIServer
from img_serving.backends.comfyui.socket import ComfyUISocket
from img_serving.backends.comfyui.workflow import MAX_SIDE, MIN_SIDE, Template, Workflow, read_workflows
from img_serving.backends.http import (
    MAX_REPLY_BYTES,
    NO_HURRY_SECONDS,
    Headers,
    Redactor,
    check_path,
    error_of,
    get,
    patience,
    unhealthy,
)
from img_serving.backends.multipart import FilePart, encode_form
from img_serving.backends.options import read_options
from img_serving.backends.samplers import sampler_and_schedule
from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import EXTENSIONS, Artifact, Call, ImageRequest, Item, ItemFailure, Preview, Progress
from img_serving.media.masks import mask_in, transparent_where_painted, white_where_painted, with_transparency
from img_serving.media.payload import artifact_from_bytes
from img_serving.ports import HealthReport, OnProgress, Transport
from img_serving.transport.proxy import Proxy

log = logging.getLogger(__name__)

UPLOAD_PATH: Final = "/upload/image"

SUBFOLDER: Final = "img-serving"
"""Where input pictures go, in ComfyUI's folder for temporary files."""


class ComfyUIOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.comfyui]`. `built_in`: whether the checkpoints are models too; unset: where there are no workflows."""

    workflows: dict[str, Any] = {}
    built_in: bool | None = None


class ComfyUIBackend:
    """Speaks to one endpoint. Such a server draws one prompt at a time: hence one slot by default."""

    def __init__(
        self,
        transport: Transport,
        *,
        websocket_url: str | None = None,
        proxy: Proxy | None = None,
        ssl_context: ssl.SSLContext | None = None,
        headers: Sequence[tuple[str, str]] = (),
        api_key: str | None = None,
        username: str | None = None,
        password: str | None = None,
        options: Mapping[str, Any] | None = None,
        health_check_path: str | None = None,
        shared: bool = False,
        max_reply_bytes: int = MAX_REPLY_BYTES,
        pace: Pace | None = None,
    ) -> None:
        """Describe the endpoint.

        Args:
            transport: HTTP to the endpoint; closed by `close`.
            websocket_url: ws(s)://…/ws of the same server; None: progress is not heard, and the history asked more often.
            proxy: the way out for the websocket.
            ssl_context: TLS settings of the websocket.
            headers: sent with every request.
            api_key: sent as a bearer.
            username: for HTTP Basic, as a proxy before ComfyUI may want it; None sends none.
            password: goes with `username`.
            options: the table `[backends.comfyui]`.
            health_check_path: asked instead of `/prompt` to learn about health.
            shared: others use the server too: what may not be ours is never interrupted.
            max_reply_bytes: the largest picture.
            pace: how often what is asked.

        Raises:
            ValueError: an option is wrong, or a workflow cannot be used; the message says where, and what would be right.
        """
        read = read_options(ComfyUIOptions, options or {})
        self._workflows: dict[str, Workflow] = read_workflows(read.workflows)
        self._built_in = not self._workflows if read.built_in is None else read.built_in
        if not (self._built_in or self._workflows):
            raise ValueError("built_in: false, and there are no workflows: nothing could be drawn")
        for workflow in self._workflows.values():
            for template in workflow.templates:
                if template.guessed:
                    does = " (its edits)" if template is workflow.edit and len(workflow.templates) > 1 else ""
                    log.info("workflow %s%s: guessed %s", workflow.name, does, template.guesses)
        self._transport = transport
        self._headers: Headers = tuple(headers)
        secrets = [api_key, password, *(value for _, value in headers)]
        if api_key is not None:
            self._headers += (("Authorization", f"Bearer {api_key}"),)
        elif username is not None:
            basic = pybase64.b64encode(f"{username}:{password or ''}".encode()).decode()
            self._headers += (("Authorization", f"Basic {basic}"),)
            secrets.append(basic)
        self._redactor = Redactor(secrets)
        pace = pace if pace is not None else Pace()
        socket = None
        if websocket_url is not None:
            socket = ComfyUISocket(
                websocket_url,
                headers=self._headers,
                proxy=proxy,
                ssl_context=ssl_context,
                reconnect_seconds=pace.reconnect,
            )
        classes = frozenset().union(*map(classes_of, self._workflows.values()))
        self._server = ComfyUIServer(transport, self._headers, self._redactor, classes)
        self._prompts = ComfyUIPrompts(
            transport,
            self._server,
            headers=self._headers,
            redactor=self._redactor,
            socket=socket,
            shared=shared,
            max_reply_bytes=max_reply_bytes,
            pace=pace,
        )
        self._health_check_path = health_check_path
        self._max_reply_bytes = max_reply_bytes
        self._was_down = True
        self._capabilities = self._describe()

    def __repr__(self) -> str:
        names = ", ".join(self._workflows) or "none"
        return f"<ComfyUIBackend {self._server.version or 'not asked yet'}: workflows {names}>"

    @property
    def protocol(self) -> str:
        """Always `comfyui`."""
        return "comfyui"

    @property
    def capabilities(self) -> Capabilities:
        """One picture a call; samplers and schedules once the server was asked, and each workflow's own."""
        return self._capabilities

    @property
    def workflows(self) -> Mapping[str, Workflow]:
        """The operator's workflows by model id, with what was guessed of each."""
        return self._workflows

    async def generate(self, call: Call, on_progress: OnProgress) -> Sequence[Artifact | ItemFailure]:
        """One prompt an item, one after the other. Cancelling takes it out of the queue, or stops it at its next step.

        Raises:
            AttemptError: `NOT_STARTED` where the server was not reached, or lacks the model or a node; `FAILED` where a node
                failed, somebody stopped it, or the server forgot it; `UNKNOWN` where it went silent or out of reach.
            BackendRefusal: the request is at fault.
        """
        return [await self._draw(call, index, on_progress) for index in range(len(call.items))]

    async def check(self, timeout_seconds: float) -> HealthReport:
        """Ask the configured path or `/prompt`, which costs the server nothing, and now and then what it has.

        `/system_stats` and the nodes are asked at the start and when the server was away, the checkpoints every five minutes.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        report = await self._check_health(timeout_seconds)
        if not report.healthy:
            self._was_down = True
            return report
        left = deadline - asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(left):
                await self._learn(everything=self._was_down)
            self._was_down = False
        except (AttemptError, TimeoutError):
            pass  # it answers, and that is what was asked; what it has is asked again at the next check
        return self._report(report.detail)

    async def close(self) -> None:
        """Close the transport."""
        await self._transport.close()

    # what there is

    def _describe(self) -> Capabilities:
        """What is known of the server and its workflows, as a record."""
        common = Capabilities(
            operations=frozenset({"generation", "edit", "variation"}),
            batch="single",
            max_batch_size=1,
            max_concurrency=1,
            honours=frozenset(
                {
                    "seed", "negative_prompt", "size", "num_inference_steps", "guidance_scale", "sampler", "scheduler",
                    "clip_skip", "strength",
                }
            ),
            sizes=SizeRule(multiple=8, rounding="down", min_side=MIN_SIDE, max_side=MAX_SIDE),
            max_steps=MAX_STEPS,
            max_images=1,
            masks=True,
            samplers=self._server.samplers,
            schedulers=self._server.schedulers,
            formats=("png",),
            progress=True,
            previews=True,
            cancels=True,
            switches_models=True,
        )  # fmt: skip
        variants = {}
        for name, workflow in self._workflows.items():
            slots = workflow.edit.slots if workflow.edit is not None else {}
            variants[name] = replace(
                common,
                operations=workflow.operations,
                honours=workflow.honours,
                honours_in_edits=workflow.honours_in_edits,
                sizes=workflow.sizes,
                default_size=None if workflow.generation is None else workflow.generation.size,
                max_images=max(1, len(slots.get("image", ()))),
                masks=bool(slots.get("mask")),
                formats=(),
            )
        base = common if self._built_in else next(iter(variants.values()))
        return replace(base, variants={name: one for name, one in variants.items() if one != base})

    def _report(self, detail: str) -> HealthReport:
        files = self._server.files
        misfits = {name: misfit(workflow, self._server.nodes) for name, workflow in self._workflows.items()}
        models = [name for name, reason in misfits.items() if reason is None]
        faults = tuple(f"it cannot run the workflow {name}: {why}" for name, why in misfits.items() if why is not None)
        if self._built_in:
            models += files or {}
        detail = "; ".join((detail, *faults))
        if not models and self._built_in and files is not None:
            detail += "; it has no checkpoint: put one into its models/checkpoints, or configure workflows"
        is_known = not self._built_in or files is not None
        found = ""
        if self._server.version is not None:
            found = f"ComfyUI{' ' if self._server.version else ''}{self._server.version} (GET {STATS_PATH} says so)"
        return HealthReport(
            healthy=True,
            detail=detail,
            models=tuple(dict.fromkeys(models)) if is_known else None,
            found=found,
            faults=faults,
        )

    async def _check_health(self, timeout_seconds: float) -> HealthReport:
        path = self._health_check_path
        report = await check_path(self._transport, path, self._headers, timeout_seconds) if path else None
        if report is not None:
            return report
        try:
            reply = await get(self._transport, PROMPT_PATH, self._headers, timeout_seconds)
        except AttemptError as error:
            return HealthReport(healthy=False, detail=error.message)
        instead = f"{path} is not there (HTTP 404), so " if path else ""
        if reply.status == 429:
            return HealthReport(healthy=True, detail=f"{instead}{PROMPT_PATH} answered HTTP 429: there, and busy")
        if reply.status != 200:
            return unhealthy(reply, PROMPT_PATH)
        if b'"exec_info"' not in reply.body:
            return HealthReport(healthy=False, detail=f"{PROMPT_PATH} answered, but not as ComfyUI does")
        return HealthReport(healthy=True, detail=f"{instead}{PROMPT_PATH} answered")

    async def _learn(self, *, everything: bool = False) -> None:
        """Ask what the server has, where that is not known. Raises AttemptError `NOT_STARTED`."""
        await self._server.learn(MODELS_SECONDS, everything=everything)
        described = self._describe()
        if described != self._capabilities:
            self._capabilities = described

    # what is sent

    async def _draw(self, call: Call, index: int, on_progress: OnProgress) -> Artifact:
        item = call.items[index]
        last = Progress(index, len(call.items))
        async with patience(call.timeout_seconds) as heard:

            def alive() -> None:
                """It is no progress, and yet no silence: whoever bounds the attempt hears of it too."""
                heard()
                on_progress(last)

            template, values, lost = await self._plan(call, item)
            if call.request.images:
                values |= await self._upload(template, call.request, alive)
            graph = template.filled(values)

            def tell(news: News) -> None:
                nonlocal last
                heard()
                last = _progress(news, index, len(call.items))
                on_progress(last)
                last = msgspec.structs.replace(last, preview=None)

            where = await self._prompts.draw(call, template, graph, tell, alive)
            reply = await self._prompts.view(where, alive)
            if reply.status == 404:
                # the answer came out of the cache, and somebody has tidied up since
                graph = template.afresh(graph, uuid4().hex)
                where = await self._prompts.draw(call, template, graph, tell, alive)
                reply = await self._prompts.view(where, alive)
        if not 200 <= reply.status < 300:
            raise AttemptError(Outcome.FAILED, f"the backend drew a picture and does not give it (HTTP {reply.status})")
        seed = item.seed if template.slots.get("seed") else None
        try:
            artifact = artifact_from_bytes(bytes(reply.body), seed)
        except ValueError as error:
            raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None
        ignored = tuple(sorted(call.request.given - template.honours | lost))
        return msgspec.structs.replace(artifact, ignored=ignored) if ignored else artifact

    async def _plan(self, call: Call, item: Item) -> tuple[Template, dict[str, Any], frozenset[str]]:
        """The graph for a call, its values, and what has no place in it. Raises AttemptError, BackendRefusal."""
        request = call.request
        name = call.model
        if name is None and self._workflows:
            name = next(iter(self._workflows))
        workflow = self._workflows.get(name) if name is not None else None
        if workflow is not None:
            template = workflow.edit if request.images else workflow.generation
            if template is None:
                reason = "it only draws, and takes no picture" if request.images else "it edits, and needs a picture"
                raise BackendRefusal(InvalidRequest(f"{workflow.name}: {reason}", param="model"))
            checkpoint = checkpoint_file(workflow, template, self._server.nodes)
            if checkpoint is None and workflow.checkpoint is not None:
                raise AttemptError(
                    Outcome.NOT_STARTED, f"the server lacks the checkpoint {workflow.checkpoint}", is_blameless=True
                )
            sizes = workflow.sizes
        else:
            checkpoint = await self._checkpoint(name)
            template = built_in(
                edit=bool(request.images), mask=request.mask is not None, clip_skip=request.clip_skip is not None
            )
            sizes = self._capabilities.sizes
        if (unfit := sizes.refusal(call.width, call.height)) is not None:
            param = "image" if request.width is None and request.images else "size"
            raise BackendRefusal(
                InvalidRequest(f"{call.width}x{call.height}: {unfit}", code="unsupported", param=param)
            )
        width, height = sizes.fit(call.width, call.height)
        own = await self._names(template, request)
        # "DPM++ 2M Karras" asks for a schedule too, which this graph may have no place for
        has_room = "scheduler" not in own or bool(template.slots.get("scheduler"))
        lost = frozenset({"sampler"}) if request.scheduler is None and not has_room else frozenset[str]()
        values: dict[str, Any] = {
            "prompt": item.prompt,
            "negative_prompt": item.negative_prompt,
            "seed": item.seed,
            "width": width,
            "height": height,
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "strength": request.usual_strength,
            "checkpoint": checkpoint,
            "clip_skip": None if request.clip_skip is None else -request.clip_skip,
            **own,
        }
        return template, {key: value for key, value in values.items() if value is not None}, lost

    async def _checkpoint(self, model: str | None) -> str:
        """The file of a model id that is no workflow's. Raises AttemptError `NOT_STARTED`: another endpoint may have it."""
        if not self._built_in:
            known = ", ".join(self._workflows)
            message = f"there is no workflow for the model {(model or '')[:80]!r} (there is: {known})"
            raise AttemptError(Outcome.NOT_STARTED, message, is_blameless=True)
        if self._server.files is None:
            await self._learn()
        return await self._server.checkpoint(model)

    async def _names(self, template: Template, request: ImageRequest) -> dict[str, str]:
        """The sampler and the schedule as this server calls them. Raises BackendRefusal where it has no such thing."""
        sampler, schedule = request.sampler, request.scheduler
        if (sampler is not None or schedule is not None) and not self._server.has_told:
            await self._learn()
        samplers, schedulers = self._server.samplers, self._server.schedulers
        for name, wanted, known in (("sampler", sampler, samplers), ("scheduler", schedule, schedulers)):
            if wanted is not None and known is not None and template.slots.get(name) and known.find(wanted) is None:
                message = f"the backend has no {name} {wanted[:80]!r} ({known.hint(wanted)})"
                raise BackendRefusal(InvalidRequest(message, param=name))
        own = sampler_and_schedule(sampler, schedule, samplers, schedulers)
        return {name: one for name, one in zip(("sampler", "scheduler"), own, strict=True) if one is not None}

    async def _upload(self, template: Template, request: ImageRequest, alive: Callable[[], None]) -> dict[str, Any]:
        """Send the input pictures and the mask; where each went. Raises AttemptError, BackendRefusal."""
        slots = template.slots
        pictures = [(one.data, EXTENSIONS[one.media_type]) for one in request.images[: len(slots["image"])]]
        values: dict[str, Any] = {}
        if slots.get("mask"):
            first = request.images[0].data
            try:
                mask = await asyncio.to_thread(mask_in, first) if request.mask is None else request.mask.data
                if template.mask_is_alpha:
                    pictures[0] = await asyncio.to_thread(with_transparency, first, mask), "png"
                else:
                    convert = white_where_painted if template.mask_is_white else transparent_where_painted
                    values["mask"] = await self._send(await asyncio.to_thread(convert, mask), "png")
            except ValueError as error:
                raise BackendRefusal(InvalidRequest(str(error), param="mask")) from None
        alive()
        images = []
        for data, extension in pictures:
            images.append(await self._send(data, extension))
            alive()
        return {"image": images, **({"mask": images[0]} if template.mask_is_alpha else values)}

    async def _send(self, data: bytes, extension: str) -> str:
        """Upload one picture, under a name that is its content's. Returns what a node that loads it takes.

        The same picture is not written again ("overwrite" would, also while another prompt is reading it).
        """
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{extension}"
        form, content_type = encode_form(
            [("type", "temp"), ("subfolder", SUBFOLDER)], [FilePart("image", name, "application/octet-stream", data)]
        )
        reply = await self._transport.request(
            "POST",
            UPLOAD_PATH,
            headers=(*self._headers, ("Content-Type", content_type)),
            body=form,
            timeout_seconds=NO_HURRY_SECONDS,
            max_body_bytes=MAX_ANSWER_BYTES,
        )
        if not 200 <= reply.status < 300:
            raise error_of(reply, self._redactor)
        try:
            return replies.read_upload(reply.body).annotated
        except NotComfyUI:
            raise not_comfyui(UPLOAD_PATH) from None


def _progress(news: News, index: int, count: int) -> Progress:
    total = max(1, news.total)
    share = min(1.0, news.done / news.total) if news.total > 0 else None
    preview = None if news.preview is None else Preview(*news.preview, index=index, share=share)
    return Progress(index * total + news.done, count * total, preview)
