"""The adapter to ComfyUI: one call is one prompt, followed over a websocket where there is one and in the history always."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final
from uuid import uuid4

import msgspec
import pybase64

from img_serving.backends import comfyui_replies as replies
from img_serving.backends.comfyui_built_in import MAX_STEPS, built_in, model_ids, samplers, schedulers
from img_serving.backends.comfyui_events import News, Watch
from img_serving.backends.comfyui_guess import steps_of
from img_serving.backends.comfyui_replies import NotComfyUI, Picture, Record, not_comfyui
from img_serving.backends.comfyui_socket import ComfyUISocket, beside
from img_serving.backends.comfyui_workflow import MAX_SIDE, MIN_SIDE, Template, Workflow, read_workflows
from img_serving.backends.http import (
    MAX_REPLY_BYTES,
    NO_HURRY_SECONDS,
    Headers,
    Redactor,
    call_headers,
    check_path,
    error_of,
    get,
    patience,
    prompts_of,
    unhealthy,
)
from img_serving.backends.options import read_options
from img_serving.backends.samplers import sampler_and_schedule
from img_serving.domain.capabilities import Capabilities, SizeRule
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import EXTENSIONS, Artifact, Call, ImageRequest, Item, ItemFailure, Preview, Progress
from img_serving.domain.vocabulary import Vocabulary
from img_serving.media.masks import mask_in, transparent_where_painted, white_where_painted, with_transparency
from img_serving.media.payload import artifact_from_bytes
from img_serving.ports import HealthReport, OnProgress, Transport, UpstreamReply
from img_serving.transport.proxy import Proxy

log = logging.getLogger(__name__)

PROMPT_PATH: Final = "/prompt"
QUEUE_PATH: Final = "/queue"
UPLOAD_PATH: Final = "/upload/image"
STATS_PATH: Final = "/system_stats"
CHECKPOINTS_PATH: Final = "/object_info/CheckpointLoaderSimple"
SAMPLER_PATH: Final = "/object_info/KSampler"

QUESTION_SECONDS: Final = 10.0
"""How long a question about what the server has may take."""

SUBFOLDER: Final = "img-serving"
"""Where input pictures go, in ComfyUI's folder for temporary files."""

MAX_QUEUE_BYTES: Final = 64 * 1024 * 1024
"""The queue is told with every waiting graph."""

MODELS_SECONDS: Final = 300.0
"""How old the list of checkpoints may be before a check asks for it again."""

MODELS_AGAIN_SECONDS: Final = 5.0
"""How soon the list is asked for again where a call names a model that is not in it."""

_WORKFLOW_FAULTS: Final = frozenset({"missing_node_type", "invalid_prompt", "prompt_no_outputs", "no_prompt"})
_LOST: Final = "the server does not know the prompt any more: it was restarted, or its queue was cleared"


@dataclass(frozen=True, slots=True)
class Pace:
    """How often what is asked, in seconds. Tests go faster.

    Attributes:
        poll: between looks into the history while the websocket is there.
        first_poll: the same without a websocket: at first, then twice as long each time up to `poll`.
        over_poll: at first, once the websocket said that the prompt is over.
        queue: between looks into the queue, for prompts that the server lost.
        unreachable: how long a server that does not answer is waited for.
        open: how long the prompt waits for the websocket.
        post: how long a cancelled call waits for the reply to a prompt that is on its way.
        stop: how long stopping the work may take.
        reconnect: the pause before a websocket is tried again: the first, and the longest.
    """

    poll: float = 1.0
    first_poll: float = 0.25
    over_poll: float = 0.02
    queue: float = 5.0
    unreachable: float = 10.0
    open: float = 2.0
    post: float = 1.0
    stop: float = 2.0
    reconnect: tuple[float, float] = (0.1, 5.0)


class ComfyUIOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.comfyui]`. `built_in`: whether the checkpoints are models too; unset: where there are no workflows."""

    workflows: dict[str, Any] = {}
    built_in: bool | None = None


@dataclass(slots=True, eq=False)
class _Run:
    """One prompt on its way through the server."""

    prompt_id: str
    client_id: str
    watch: Watch
    hint: asyncio.Event = field(default_factory=asyncio.Event)
    """Something happened: look into the history now."""
    tried: asyncio.Event = field(default_factory=asyncio.Event)
    """The websocket is there, or could not be had."""
    started: asyncio.Event = field(default_factory=asyncio.Event)
    """The server said that it began."""
    is_listening: bool = False
    is_suspect: bool = False
    """The server may have lost the prompt."""
    has_moved: bool = False
    """The queue changed: somebody may have cleared it."""
    ahead: int | None = None
    may_be_there: bool = False
    """The server has the prompt, or may have it, and is not done with it."""

    def heard(self, news: News | None) -> None:
        """Over: look. And a server that has nothing to do has not got our prompt any more."""
        if news is not None:
            if self.watch.has_started:
                self.started.set()
            if news.is_over:
                self.hint.set()
            return
        self.has_moved = True
        if self.may_be_there and self.watch.is_idle:
            self.watch.is_idle = False
            self.is_suspect = True
            self.hint.set()

    def connected(self, there: bool) -> None:
        """The websocket came or went: what happened meanwhile was not told."""
        # one that went takes the server's word with it, and one that is back may be another server's
        self.is_suspect = self.is_suspect or self.is_listening or (there and self.tried.is_set())
        self.is_listening = there
        self.tried.set()
        self.hint.set()


class _Silence(Exception):
    """The server could not be asked; why is in `error`."""

    def __init__(self, error: AttemptError) -> None:
        super().__init__(error.message)
        self.error = error


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
        self._pace = pace if pace is not None else Pace()
        self._socket = (
            ComfyUISocket(
                websocket_url,
                headers=self._headers,
                proxy=proxy,
                ssl_context=ssl_context,
                reconnect_seconds=self._pace.reconnect,
            )
            if websocket_url is not None
            else None
        )
        self._health_check_path = health_check_path
        self._shared = shared
        self._max_reply_bytes = max_reply_bytes
        # what the server told about itself
        self._files: dict[str, str] | None = None
        self._files_at = float("-inf")
        self._samplers: Vocabulary | None = None
        self._schedulers: Vocabulary | None = None
        self._version: str | None = None
        self._has_told = False
        self._cancels_jobs: bool | None = None
        self._was_down = True
        self._learning = asyncio.Lock()
        self._socket_hangs = False
        self._capabilities = self._describe()

    def __repr__(self) -> str:
        names = ", ".join(self._workflows) or "none"
        return f"<ComfyUIBackend {self._version or 'not asked yet'}: workflows {names}>"

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
                await self._learn(MODELS_SECONDS, everything=self._was_down)
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
            operations=frozenset({"generation", "edit"}),
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
            samplers=self._samplers,
            schedulers=self._schedulers,
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
                sizes=workflow.sizes,
                max_images=max(1, len(slots.get("image", ()))),
                masks=bool(slots.get("mask")),
                formats=(),
            )
        base = common if self._built_in else next(iter(variants.values()))
        return replace(base, variants={name: one for name, one in variants.items() if one != base})

    def _report(self, detail: str) -> HealthReport:
        missing = []
        models = []
        for name, workflow in self._workflows.items():
            lacking = workflow.checkpoints() - set(self._files.values()) if self._files is not None else frozenset()
            if lacking:
                missing.append(f"{name} wants {', '.join(sorted(lacking))}")
            else:
                models.append(name)
        if self._built_in:
            models += self._files or {}
        if missing:
            detail += f"; it lacks checkpoints ({'; '.join(missing)})"
        if not models and self._built_in and self._files is not None:
            detail += "; it has no checkpoint: put one into its models/checkpoints, or configure workflows"
        is_known = not self._built_in or self._files is not None
        found = ""
        if self._version is not None:
            found = f"ComfyUI{' ' if self._version else ''}{self._version} (GET {STATS_PATH} says so)"
        return HealthReport(
            healthy=True, detail=detail, models=tuple(dict.fromkeys(models)) if is_known else None, found=found
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

    async def _learn(self, oldest_seconds: float, *, everything: bool = False) -> None:
        """Ask what the server has, unless that is known and not older than this. Raises AttemptError `NOT_STARTED`."""
        async with self._learning:
            clock = asyncio.get_running_loop().time
            if everything or not self._has_told:
                reply = await self._ask(STATS_PATH)
                version = replies.read_version(reply.body) if reply.status == 200 else None
                if version != self._version:
                    self._cancels_jobs = None  # another version may know other routes
                self._version = version
                body = (await self._ask(SAMPLER_PATH)).body
                names = replies.read_choices(body, "KSampler", "sampler_name")
                schedules = replies.read_choices(body, "KSampler", "scheduler")
                self._schedulers = schedulers(schedules) if schedules else None
                self._samplers = samplers(names, self._schedulers) if names else None
                self._has_told = True
            if everything or clock() - self._files_at >= oldest_seconds:
                body = (await self._ask(CHECKPOINTS_PATH)).body
                files = replies.read_choices(body, "CheckpointLoaderSimple", "ckpt_name")
                self._files = None if files is None else model_ids(files)
                self._files_at = clock()
            described = self._describe()
            if described != self._capabilities:
                self._capabilities = described

    async def _ask(self, path: str) -> UpstreamReply:
        """A question before anything is drawn: whatever goes wrong, trying elsewhere is free of risk."""
        try:
            reply = await get(self._transport, path, self._headers, QUESTION_SECONDS)
        except AttemptError as error:
            raise AttemptError(Outcome.NOT_STARTED, error.message) from None
        if reply.status not in {200, 404}:
            meant = error_of(reply, self._redactor)
            raise AttemptError(Outcome.NOT_STARTED, str(meant), busy_seconds=getattr(meant, "busy_seconds", None))
        return reply

    # what is sent

    async def _draw(self, call: Call, index: int, on_progress: OnProgress) -> Artifact:
        item = call.items[index]
        async with patience(call.timeout_seconds) as alive:
            template, values, honours = await self._plan(call, item)
            if call.request.images:
                values |= await self._upload(template, call.request, alive)
            graph = template.filled(values)

            def tell(news: News) -> None:
                alive()
                on_progress(_progress(news, index, len(call.items)))

            where = await self._execute(call, template, graph, tell, alive)
            reply = await self._view(where, alive)
            if reply.status == 404:
                # the answer came out of the cache, and somebody has tidied up since
                graph = template.afresh(graph, uuid4().hex)
                where = await self._execute(call, template, graph, tell, alive)
                reply = await self._view(where, alive)
        if not 200 <= reply.status < 300:
            raise AttemptError(Outcome.FAILED, f"the backend drew a picture and does not give it (HTTP {reply.status})")
        seed = item.seed if template.slots.get("seed") else None
        try:
            artifact = artifact_from_bytes(bytes(reply.body), seed)
        except ValueError as error:
            raise AttemptError(Outcome.FAILED, f"the backend's reply is no use: {error}") from None
        ignored = tuple(sorted((call.request.given & honours) - template.honours))
        return msgspec.structs.replace(artifact, ignored=ignored) if ignored else artifact

    async def _plan(self, call: Call, item: Item) -> tuple[Template, dict[str, Any], frozenset[str]]:
        """The graph for a call, its values, and what its model honours. Raises AttemptError, BackendRefusal."""
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
            checkpoint, sizes, honours = workflow.checkpoint, workflow.sizes, workflow.honours
        else:
            checkpoint = await self._checkpoint(name)
            template = built_in(
                edit=bool(request.images), mask=request.mask is not None, clip_skip=request.clip_skip is not None
            )
            sizes, honours = self._capabilities.sizes, self._capabilities.honours
        width, height = sizes.fit(call.width, call.height)
        values: dict[str, Any] = {
            "prompt": item.prompt,
            "negative_prompt": item.negative_prompt,
            "seed": item.seed,
            "width": width,
            "height": height,
            "steps": request.steps,
            "guidance_scale": request.guidance_scale,
            "strength": request.strength,
            "checkpoint": checkpoint,
            "clip_skip": None if request.clip_skip is None else -request.clip_skip,
            **await self._names(template, request),
        }
        return template, {key: value for key, value in values.items() if value is not None}, honours

    async def _checkpoint(self, model: str | None) -> str:
        """The file of a model id. Raises AttemptError `NOT_STARTED`: another endpoint may have it."""
        if not self._built_in:
            known = ", ".join(self._workflows)
            message = f"there is no workflow for the model {(model or '')[:80]!r} (there is: {known})"
            raise AttemptError(Outcome.NOT_STARTED, message)
        if self._files is None or (found := _file_of(model, self._files)) is None:
            await self._learn(MODELS_AGAIN_SECONDS)
            if self._files is None:
                if model is None:
                    raise AttemptError(Outcome.NOT_STARTED, "the server does not say which checkpoints it has")
                return model  # it decides itself
            found = _file_of(model, self._files)
        if found is None:
            known = ", ".join(list(self._files)[:8]) or "none"
            message = f"the server has no checkpoint {(model or 'at all')[:80]!r} (it has: {known})"
            raise AttemptError(Outcome.NOT_STARTED, message)
        return found

    async def _names(self, template: Template, request: ImageRequest) -> dict[str, str]:
        """The sampler and the schedule as this server calls them. Raises BackendRefusal where it has no such thing."""
        sampler, schedule = request.sampler, request.scheduler
        if (sampler is not None or schedule is not None) and not self._has_told:
            await self._learn(MODELS_SECONDS)
        for name, wanted, known in (("sampler", sampler, self._samplers), ("scheduler", schedule, self._schedulers)):
            if wanted is not None and known is not None and template.slots.get(name) and known.find(wanted) is None:
                message = f"the backend has no {name} {wanted[:80]!r} (the nearest it has: {', '.join(known.nearest(wanted))})"
                raise BackendRefusal(InvalidRequest(message, param=name))
        own = sampler_and_schedule(sampler, schedule, self._samplers, self._schedulers)
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
        boundary = uuid4().hex
        name = f"{hashlib.sha256(data).hexdigest()[:32]}.{extension}"
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{field_name}"\r\n\r\n{value}\r\n'
            for field_name, value in (("type", "temp"), ("subfolder", SUBFOLDER))
        ]
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n"
        )
        reply = await self._transport.request(
            "POST",
            UPLOAD_PATH,
            headers=(*self._headers, ("Content-Type", f"multipart/form-data; boundary={boundary}")),
            body=b"".join(("".join(parts).encode(), data, f"\r\n--{boundary}--\r\n".encode())),
            timeout_seconds=NO_HURRY_SECONDS,
            max_body_bytes=self._max_reply_bytes,
        )
        if not 200 <= reply.status < 300:
            raise error_of(reply, self._redactor)
        try:
            return replies.read_upload(reply.body).annotated
        except NotComfyUI:
            raise not_comfyui(UPLOAD_PATH) from None

    # one prompt

    async def _execute(
        self,
        call: Call,
        template: Template,
        graph: Mapping[str, Any],
        tell: Callable[[News], None],
        alive: Callable[[], None],
    ) -> Picture:
        """Have a graph drawn; where its picture is. Whatever ends this early also ends the work at the server."""
        prompt_id = str(uuid4())
        expected = steps_of(graph, template.output)
        run = _Run(prompt_id, uuid4().hex, Watch(prompt_id, expected, previews=call.previews))

        def on_frame(frame: str | bytes) -> None:
            news = run.watch.take(frame)
            if news is not None:
                tell(news)
            run.heard(news)

        try:
            listening = self._socket.listen(run.client_id, on_frame, run.connected) if self._socket else None
            async with beside(listening, "the websocket to ComfyUI") if listening is not None else nullcontext():
                if listening is not None:
                    await self._wait_for_socket(run)
                try:
                    await self._post(run, call, template, graph)
                    record = await self._follow(run, alive)
                except BaseException:
                    if run.may_be_there and run.is_listening and not run.started.is_set():
                        await self._stop(run)  # while the websocket is there to say when the prompt begins
                        run.may_be_there = False
                    raise
        except BaseException:
            if run.may_be_there:
                await self._stop(run)
            raise
        failure = record.failure()
        if failure is not None:
            raise AttemptError(Outcome.FAILED, self._redactor.clean(failure, prompts_of(call)))
        picture = record.picture(template.output)
        if picture is None:
            kind = template.graph[template.output]["class_type"]
            raise AttemptError(Outcome.FAILED, f"node {template.output} ({kind}) gave no picture")
        return picture

    async def _wait_for_socket(self, run: _Run) -> None:
        """What happens before the websocket is there is not told; but one that cannot be had keeps nobody waiting twice."""
        if self._socket_hangs and not run.tried.is_set():
            await asyncio.sleep(0)
            return
        try:
            async with asyncio.timeout(self._pace.open):
                await run.tried.wait()
            self._socket_hangs = False
        except TimeoutError:
            self._socket_hangs = True

    async def _post(self, run: _Run, call: Call, template: Template, graph: Mapping[str, Any]) -> None:
        """Put the prompt into the queue. Raises AttemptError, BackendRefusal.

        A call that is cancelled meanwhile waits a moment for the reply: a request that was cut off may still be taken in,
        after the attempt to stop it.
        """
        body: dict[str, Any] = {"prompt": graph, "client_id": run.client_id, "prompt_id": run.prompt_id}
        if call.previews:
            # newer servers show previews to whom asks for them, whatever they were started with
            body["extra_data"] = {"preview_method": "auto"}
        posting = asyncio.ensure_future(
            self._transport.request(
                "POST",
                PROMPT_PATH,
                headers=call_headers(self._headers, call),
                body=msgspec.json.encode(body),
                timeout_seconds=NO_HURRY_SECONDS,
                max_body_bytes=self._max_reply_bytes,
            )
        )
        run.may_be_there = True
        try:
            reply = await asyncio.shield(posting)
        except asyncio.CancelledError:
            await asyncio.wait({posting}, timeout=self._pace.post)
            posting.cancel()
            await asyncio.wait({posting})
            if not posting.cancelled() and posting.exception() is None:
                self._take_reply(run, posting.result())
            raise
        except AttemptError as error:
            run.may_be_there = error.outcome is not Outcome.NOT_STARTED
            if error.outcome is not Outcome.UNKNOWN:
                raise
            # the reply was cut off; whether the prompt arrived can be seen
            if not await self._is_there(run):
                raise
            return
        accepted = self._take_reply(run, reply)
        if accepted is None:
            if not 200 <= reply.status < 300:
                raise self._refusal(reply, template, call)
            raise not_comfyui(PROMPT_PATH)
        if template.output in replies.lost_outputs(accepted):
            raise self._refusal(reply, template, call)

    def _take_reply(self, run: _Run, reply: UpstreamReply) -> replies.Accepted | None:
        """What the reply to a prompt means for the run; None where it was not taken in."""
        if not 200 <= reply.status < 300:
            run.may_be_there = reply.status >= 500
            return None
        try:
            accepted = replies.read_accepted(reply.body)
        except NotComfyUI:
            return None
        run.prompt_id = run.watch.prompt_id = accepted.prompt_id
        return accepted

    async def _is_there(self, run: _Run) -> bool:
        try:
            return await self._record(run) is not None or await self._queued(run) is not None
        except _Silence:
            return False

    async def _follow(self, run: _Run, alive: Callable[[], None]) -> Record:
        """Wait for the prompt's record in the history. Raises AttemptError."""
        clock = asyncio.get_running_loop().time
        pace = self._pace
        pause = pace.first_poll
        was_over = False
        silent_since: float | None = None
        looked_at = clock()
        while True:
            run.hint.clear()
            try:
                record = await self._record(run)
                look_at = looked_at + (pace.poll if run.has_moved and not run.started.is_set() else pace.queue)
                if record is None and (run.is_suspect or clock() >= look_at):
                    run.has_moved = False
                    looked_at = clock()
                    record = await self._look_for(run, alive)
                if record is not None:
                    run.may_be_there = False
                    return record
                silent_since = None
            except _Silence as silence:
                now = clock()
                silent_since = now if silent_since is None else silent_since
                run.is_suspect = True
                if now - silent_since >= pace.unreachable:
                    reason = f"the server went out of reach while it was drawing ({silence.error.message})"
                    raise AttemptError(Outcome.UNKNOWN, reason) from None
            if run.watch.is_over and not was_over:
                was_over, pause = True, pace.over_poll
            try:
                async with asyncio.timeout(pace.poll if run.is_listening and not was_over else pause):
                    await run.hint.wait()
            except TimeoutError:
                pause = min(2 * pause, pace.poll)

    async def _look_for(self, run: _Run, alive: Callable[[], None]) -> Record | None:
        """Whether the server still has the prompt; its record, if it ended meanwhile. Raises AttemptError `FAILED` if not."""
        queued = await self._queued(run)
        if queued is None:
            # between the two looks it may have gone from the one to the other
            record = await self._record(run)
            if record is None:
                run.may_be_there = False
                raise AttemptError(Outcome.FAILED, _LOST)
            return record
        run.is_suspect = False
        if run.ahead is not None and queued.ahead < run.ahead:
            alive()  # it moves up: nobody draws it yet, and yet it is not silence
        run.ahead = queued.ahead
        return None

    async def _record(self, run: _Run) -> Record | None:
        body = await self._inquire(f"/history/{run.prompt_id}", self._max_reply_bytes)
        try:
            return replies.read_record(body, run.prompt_id)
        except NotComfyUI:
            raise _Silence(not_comfyui("/history")) from None

    async def _queued(self, run: _Run) -> replies.Queued | None:
        body = await self._inquire(QUEUE_PATH, MAX_QUEUE_BYTES)
        try:
            found = replies.find_queued(body, run.prompt_id, run.client_id)
        except NotComfyUI:
            raise _Silence(not_comfyui(QUEUE_PATH)) from None
        if found is not None:
            run.prompt_id = run.watch.prompt_id = found.prompt_id
        return found

    async def _inquire(self, path: str, max_body_bytes: int) -> bytes | bytearray:
        """A question while the server draws. Raises _Silence: that one got no answer does not mean that it stopped."""
        try:
            reply = await self._transport.request(
                "GET", path, headers=self._headers, timeout_seconds=NO_HURRY_SECONDS, max_body_bytes=max_body_bytes
            )
        except AttemptError as error:
            raise _Silence(error) from None
        if reply.status != 200:
            raise _Silence(AttemptError(Outcome.FAILED, f"{path.partition('?')[0]} answered HTTP {reply.status}"))
        return reply.body

    async def _view(self, where: Picture, alive: Callable[[], None]) -> UpstreamReply:
        """Get the picture, which is there: a cut reply is asked for again, twice. Raises AttemptError."""
        for pause in (self._pace.first_poll, self._pace.first_poll, None):
            try:
                return await self._transport.request(
                    "GET",
                    where.path,
                    headers=self._headers,
                    timeout_seconds=NO_HURRY_SECONDS,
                    max_body_bytes=self._max_reply_bytes,
                )
            except AttemptError as error:
                if error.outcome is Outcome.FAILED:
                    raise
                if pause is None:
                    raise AttemptError(
                        Outcome.UNKNOWN, f"the picture is drawn, but not here: {error.message}"
                    ) from None
                await asyncio.sleep(pause)
                alive()
        raise AssertionError("the last try returns or raises")  # pragma: no cover

    async def _stop(self, run: _Run) -> None:
        """Stop the work on one prompt at the server: ours, and nobody else's. Never raises, and takes `pace.stop` at most.

        A server forgets an interrupt that comes just before a prompt starts. So one that has not been seen to start is
        stopped again when it does, or is asked after until it is gone.
        """
        try:
            async with asyncio.timeout(self._pace.stop):
                pause = self._pace.over_poll
                has_started = False
                while not has_started:
                    has_started = run.started.is_set()
                    if not await self._stop_once(run):
                        break
                    if not has_started:
                        with suppress(TimeoutError):
                            await asyncio.wait_for(run.started.wait(), pause)
                        pause *= 2
        except (AttemptError, _Silence, TimeoutError) as error:
            reason = str(error) or f"no answer within {self._pace.stop:g} s"
            log.warning("a prompt that nobody wants any more was not stopped at the server: %s", reason)

    async def _stop_once(self, run: _Run) -> bool:
        """Ask for it. Returns whether there was something to stop, which may be there still."""
        if self._cancels_jobs is not False:
            reply = await self._tell(f"/api/jobs/{run.prompt_id}/cancel", {})
            self._cancels_jobs = reply.status not in {404, 405}
            if 200 <= reply.status < 300:
                return not replies.is_nothing_to_cancel(reply.body)
        await self._tell(QUEUE_PATH, {"delete": [run.prompt_id]})
        queued = await self._queued(run)
        if queued is None:
            return False
        if not queued.is_running:
            return True  # it has another id than we gave it, and now we know that
        if not await self._may_interrupt():
            return False
        await self._tell("/interrupt", {"prompt_id": queued.prompt_id})
        return True

    async def _may_interrupt(self) -> bool:
        """Old servers stop whatever runs, which by now may be somebody else's: harmless only where there is nobody else."""
        if not self._shared:
            return True
        if not self._has_told:
            await self._learn(MODELS_SECONDS)
        return replies.heeds_interrupted_id(self._version or "")

    async def _tell(self, path: str, document: Mapping[str, Any]) -> UpstreamReply:
        return await self._transport.request(
            "POST",
            path,
            headers=(*self._headers, ("Content-Type", "application/json")),
            body=msgspec.json.encode(document),
            timeout_seconds=self._pace.stop,
            max_body_bytes=self._max_reply_bytes,
        )

    def _refusal(self, reply: UpstreamReply, template: Template, call: Call) -> AttemptError | BackendRefusal:
        """What a prompt was refused for: a value of the request's, or something that this server or workflow lacks."""
        document = None
        if reply.status in {200, 400}:
            try:
                document = msgspec.json.decode(reply.body)
            except (ValueError, RecursionError):
                document = None
        faults = replies.faults_in(document)
        if not faults:
            return error_of(reply, self._redactor, prompts_of(call))
        for fault in faults:
            parameter = template.parameter_at(fault.node, fault.name)
            if parameter is not None:
                message = self._redactor.clean(fault.message, prompts_of(call))
                if parameter == "model":
                    self._files_at = float("-inf")  # it had it before
                    return AttemptError(Outcome.NOT_STARTED, f"the server lacks the checkpoint: {message}")
                return BackendRefusal(InvalidRequest(message, param=parameter))
        message = self._redactor.clean(faults[0].message, prompts_of(call))
        if faults[0].node or faults[0].kind in _WORKFLOW_FAULTS:
            # nothing that the request says: another server may have the node or the file
            return AttemptError(Outcome.NOT_STARTED, f"the server cannot run the workflow: {message}")
        return BackendRefusal(InvalidRequest(message))


def _file_of(model: str | None, files: Mapping[str, str]) -> str | None:
    """The checkpoint meant: by model id, or by the file's own name; the first one where none is named."""
    if model is None:
        return next(iter(files.values()), None)
    if model in files:
        return files[model]
    plain = model.replace("\\", "/")
    return next((file for file in files.values() if file.replace("\\", "/") == plain), None)


def _progress(news: News, index: int, count: int) -> Progress:
    total = max(1, news.total)
    preview = None if news.preview is None else Preview(*news.preview, index=index)
    return Progress(index * total + news.done, count * total, preview)
