"""What a ComfyUI server has, as it tells: checkpoints, samplers, schedules, and which version it is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import quote

from img_serving.backends.comfyui import replies
from img_serving.backends.comfyui.built_in import model_ids, samplers, schedulers
from img_serving.backends.comfyui.fitness import NodeClass, read_node
from img_serving.backends.http import Headers, Redactor, error_of, get
from img_serving.domain.errors import AttemptError, Outcome
from img_serving.domain.vocabulary import Vocabulary, shown
from img_serving.ports import Transport, UpstreamReply

STATS_PATH: Final = "/system_stats"
CHECKPOINTS_PATH: Final = "/object_info/CheckpointLoaderSimple"
SAMPLER_PATH: Final = "/object_info/KSampler"

QUESTION_SECONDS: Final = 10.0
"""How long a question about what the server has may take."""

MAX_NAMES: Final = 5000
"""Of each list: no server has more, and each is looked at whenever it changes."""

MODELS_SECONDS: Final = 300.0
"""How old the lists of checkpoints and other choices may be before a check asks for them again."""

MODELS_AGAIN_SECONDS: Final = 5.0
"""How soon the list is asked for again where a call names a model that is not in it."""


class ComfyUIServer:
    """Asked once and remembered, for none of it is free for the server.

    Attributes:
        files: model id to checkpoint file; None: it does not say, or was not asked.
        samplers: None, likewise.
        schedulers: None, likewise.
        nodes: what it says of the classes of nodes that workflows need; None: it has none of that name.
        version: "" where it is ComfyUI that does not tell, None where it was not asked or is something else.
        cancels_jobs: whether it has the route that cancels one job; None: nobody tried.
    """

    def __init__(self, transport: Transport, headers: Headers, redactor: Redactor, classes: Iterable[str] = ()) -> None:
        """`transport` is somebody else's to close; `classes` are those of the nodes to ask about."""
        self._transport = transport
        self._headers = headers
        self._redactor = redactor
        self.files: dict[str, str] | None = None
        self.samplers: Vocabulary | None = None
        self.schedulers: Vocabulary | None = None
        self.nodes: dict[str, NodeClass | None] = {}
        self._classes = tuple(sorted(classes))
        self.version: str | None = None
        self.cancels_jobs: bool | None = None
        self.has_told = False
        self._files_at = float("-inf")
        self._asking = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<ComfyUIServer {self.version or 'not asked yet'}: {len(self.files or ())} checkpoints>"

    def forget_files(self) -> None:
        """The list of checkpoints has proven old."""
        self._files_at = float("-inf")

    async def heeds_interrupted_id(self) -> bool:
        """Whether it interrupts the prompt that it is told and no other. Raises AttemptError `NOT_STARTED`."""
        if not self.has_told:
            await self.learn(MODELS_SECONDS)
        return replies.heeds_interrupted_id(self.version or "")

    async def learn(self, oldest_seconds: float, *, everything: bool = False) -> None:
        """Ask what the server has, unless that is known and not older than this. Raises AttemptError `NOT_STARTED`."""
        async with self._asking:
            clock = asyncio.get_running_loop().time
            if everything or not self.has_told:
                reply = await self._ask(STATS_PATH)
                version = replies.read_version(reply.body) if reply.status == 200 else None
                if version != self.version:
                    self.cancels_jobs = None  # another version may know other routes
                self.version = version
                body = (await self._ask(SAMPLER_PATH)).body
                names = replies.read_choices(body, "KSampler", "sampler_name")
                schedules = replies.read_choices(body, "KSampler", "scheduler")
                self.schedulers = schedulers(schedules[:MAX_NAMES]) if schedules else None
                self.samplers = samplers(names[:MAX_NAMES], self.schedulers) if names else None
                self.has_told = True
            if everything or clock() - self._files_at >= oldest_seconds:
                body = (await self._ask(CHECKPOINTS_PATH)).body
                files = replies.read_choices(body, "CheckpointLoaderSimple", "ckpt_name")
                self.files = None if files is None else model_ids(files[:MAX_NAMES])
                nodes: dict[str, NodeClass | None] = {}
                for name in self._classes:
                    nodes |= read_node((await self._ask(f"/object_info/{quote(name, safe='')}")).body, name)
                self.nodes = nodes
                self._files_at = clock()

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

    async def checkpoint(self, model: str | None) -> str:
        """The file of a model id. Raises AttemptError `NOT_STARTED`: another endpoint may have it."""
        if self.files is None or (found := _file_of(model, self.files)) is None:
            await self.learn(MODELS_AGAIN_SECONDS)
            if self.files is None:
                if model is None:
                    raise AttemptError(Outcome.NOT_STARTED, "the server does not say which checkpoints it has")
                return model  # it decides itself
            found = _file_of(model, self.files)
        if found is None:
            known = ", ".join(shown(name) for name in list(self.files)[:8]) or "none"
            message = f"the server has no checkpoint {shown(model or 'at all')!r} (it has: {known})"
            raise AttemptError(Outcome.NOT_STARTED, message, is_blameless=True)
        return found


def _file_of(model: str | None, files: Mapping[str, str]) -> str | None:
    """The checkpoint meant: by model id, or by the file's own name; the first one where none is named."""
    if model is None:
        return next(iter(files.values()), None)
    if model in files:
        return files[model]
    plain = model.replace("\\", "/")
    return next((file for file in files.values() if file.replace("\\", "/") == plain), None)
