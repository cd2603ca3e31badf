"""One prompt at ComfyUI: put into the queue, followed to its end over the websocket and in the history, and stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import uuid4

import msgspec

from img_serving.backends.comfyui import replies
from img_serving.backends.comfyui.events import News, Watch
from img_serving.backends.comfyui.guess import steps_of
from img_serving.backends.comfyui.replies import NotComfyUI, Picture, Record, not_comfyui
from img_serving.backends.comfyui.server import ComfyUIServer
from img_serving.backends.comfyui.socket import ComfyUISocket, beside
from img_serving.backends.comfyui.workflow import Template
from img_serving.backends.http import NO_HURRY_SECONDS, Headers, Redactor, call_headers, error_of, prompts_of
from img_serving.domain.errors import AttemptError, BackendRefusal, InvalidRequest, Outcome
from img_serving.domain.images import Call
from img_serving.ports import Transport, UpstreamReply

log = logging.getLogger(__name__)

PROMPT_PATH: Final = "/prompt"
QUEUE_PATH: Final = "/queue"

MAX_QUEUE_BYTES: Final = 16 * 1024 * 1024
"""The queue is told with every waiting graph."""

MAX_ANSWER_BYTES: Final = 8 * 1024 * 1024
"""Everything but pictures and the queue: a record holds one graph."""

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


class ComfyUIPrompts:
    """Has graphs drawn at one endpoint."""

    def __init__(
        self,
        transport: Transport,
        server: ComfyUIServer,
        *,
        headers: Headers,
        redactor: Redactor,
        socket: ComfyUISocket | None,
        shared: bool,
        max_reply_bytes: int,
        pace: Pace,
    ) -> None:
        """`socket` None: progress is not heard. `shared`: what may not be ours is never interrupted."""
        self._transport = transport
        self._server = server
        self._headers = headers
        self._redactor = redactor
        self._socket = socket
        self._shared = shared
        self._max_reply_bytes = max_reply_bytes
        self._pace = pace
        self._socket_hangs = False

    async def draw(
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
                max_body_bytes=MAX_ANSWER_BYTES,
            )
        )
        run.may_be_there = True
        try:
            reply = await asyncio.shield(posting)
        except asyncio.CancelledError:
            try:
                await asyncio.wait({posting}, timeout=self._pace.post)
            finally:
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
                raise self._refusal(reply, template, graph, call)
            raise not_comfyui(PROMPT_PATH)
        if template.output in replies.lost_outputs(accepted):
            raise self._refusal(reply, template, graph, call)

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
        body = await self._inquire(f"/history/{run.prompt_id}", MAX_ANSWER_BYTES)
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

    async def view(self, where: Picture, alive: Callable[[], None]) -> UpstreamReply:
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
        except (AttemptError, _Silence, TimeoutError, ValueError) as error:
            reason = str(error) or f"no answer within {self._pace.stop:g} s"
            log.warning("a prompt that nobody wants any more was not stopped at the server: %s", reason)

    async def _stop_once(self, run: _Run) -> bool:
        """Ask for it. Returns whether there was something to stop, which may be there still."""
        if self._server.cancels_jobs is not False:
            reply = await self._tell(f"/api/jobs/{run.prompt_id}/cancel", {})
            self._server.cancels_jobs = reply.status not in {404, 405}
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
        return not self._shared or await self._server.heeds_interrupted_id()

    async def _tell(self, path: str, document: Mapping[str, Any]) -> UpstreamReply:
        return await self._transport.request(
            "POST",
            path,
            headers=(*self._headers, ("Content-Type", "application/json")),
            body=msgspec.json.encode(document),
            timeout_seconds=self._pace.stop,
            max_body_bytes=MAX_ANSWER_BYTES,
        )

    def _refusal(
        self, reply: UpstreamReply, template: Template, graph: Mapping[str, Any], call: Call
    ) -> AttemptError | BackendRefusal:
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
            message = self._redactor.clean(fault.message, prompts_of(call))
            if parameter == "model":
                self._server.forget_files()
                reason = f"the server lacks the checkpoint: {message}"
                return AttemptError(Outcome.NOT_STARTED, reason, is_blameless=True)
            # what the request left out is the graph's own
            if parameter is not None and not _is_own(template, graph, fault):
                return BackendRefusal(InvalidRequest(message, param=parameter))
        message = self._redactor.clean(faults[0].message, prompts_of(call))
        if faults[0].node or faults[0].kind in _WORKFLOW_FAULTS:
            # nothing that the request says: another server may have the node or the file
            self._server.forget_files()
            reason = f"the server cannot run the workflow: {message}"
            return AttemptError(Outcome.NOT_STARTED, reason, is_blameless=True)
        return BackendRefusal(InvalidRequest(message))


def _is_own(template: Template, graph: Mapping[str, Any], fault: replies.Fault) -> bool:
    """Whether the value at fault is the workflow's own, and not one that was put in."""
    sent, own = (one.get(fault.node, {}).get("inputs", {}) for one in (graph, template.graph))
    return fault.name in own and bool(sent.get(fault.name) == own[fault.name])
