"""A job that others than its own caller may follow: what has happened to it so far, and who is told of what happens next."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from weakref import ref

import pybase64
from msgspec import structs

from img_serving.domain.errors import GatewayError
from img_serving.domain.images import Artifact, Preview
from img_serving.domain.jobs import Job
from img_serving.domain.stored import StoredJob
from img_serving.media.payload import base64_text
from img_serving.policy.partials import Partials


class Encoded:
    """A picture as base64, for as long as somebody is being told of it."""

    __slots__ = ("__weakref__", "text")

    def __init__(self, text: bytes | memoryview) -> None:
        self.text = text


@dataclass(slots=True, eq=False)
class _Told(ABC):
    """What many followers may be told of at once: its picture is encoded for all of them, and forgotten after the last."""

    index: int
    _encoded: ref[Encoded] | None = field(default=None, init=False, repr=False)

    def encoded(self) -> Encoded:
        """Its picture. Whoever sends it holds this until it is sent."""
        found = None if self._encoded is None else self._encoded()
        if found is None:
            found = Encoded(self._text())
            self._encoded = ref(found)
        return found

    @abstractmethod
    def _text(self) -> bytes | memoryview:
        """Its picture as base64."""


@dataclass(slots=True, eq=False)
class PartialNews(_Told):
    """An unfinished picture that is passed on: the `number`th of image `index`. The finished one will have `size` (pixels)."""

    number: int
    preview: Preview
    size: tuple[int, int] | None = None

    def _text(self) -> bytes | memoryview:
        return pybase64.b64encode(self.preview.data)


@dataclass(slots=True, eq=False)
class PictureNews(_Told):
    """Image `index` is done, and as it will be delivered."""

    artifact: Artifact

    def _text(self) -> bytes | memoryview:
        return base64_text(self.artifact)


News = PartialNews | PictureNews


class LiveJob:
    """A job on its way, for those who follow it (it is the job's watcher, see `domain.jobs.JobWatcher`).

    `stored` is the job as its store has it, or would have it. `news` only grows: a follower that comes late, or again, reads
    on where it stopped. `followers` counts clients on a connection; a job that is not `kept` ends when the last has left.
    """

    def __init__(
        self,
        job: Job,
        stored: StoredJob,
        *,
        durable: bool,
        kept: bool,
        on_drawn: Callable[[LiveJob, int, Artifact], None],
        unix_clock: Callable[[], float],
    ) -> None:
        """`on_drawn` is told of each picture as the engine made it, once; `finished` is called with what is delivered."""
        self.job = job
        self.stored = stored
        self.durable = durable
        self.kept = kept
        self.news: list[News] = []
        self.news_ids: list[int] = []
        """When each of them came: microseconds of the wall clock, each greater than the one before."""
        self.followers = 0
        self.version = 0
        """Counts what followers may want to know; see `changed`."""
        self.artifacts: list[Artifact] | None = None
        """Its pictures as they are delivered, once it has succeeded."""
        self.error: GatewayError | None = None
        self.is_over = False
        self.cancelled = False
        """Somebody asked for it to end: it is not tried again."""
        self.is_submitted = False
        """Whether the dispatcher has it."""
        self.waiting_for: str | None = None
        """Why it is not drawn, while no backend can take it and it is tried again later."""
        self.missing_since: float | None = None
        """Since when nobody serves what it asks for (Unix seconds)."""
        self.to_submit = 0
        """Its tasks that were let in and do not stand in line yet."""
        self.woken = asyncio.Event()
        """Set when it is cancelled, or the gateway stops: between two tries it would not hear of it."""
        self.conversions: dict[int, asyncio.Task[Artifact | GatewayError]] = {}
        self.leaving: asyncio.TimerHandle | None = None
        """Runs while it waits for a client that may come back."""
        self.size: tuple[int, int] | None = None
        """What the pictures of its last call were to be (pixels)."""
        self._on_drawn = on_drawn
        self._unix_clock = unix_clock
        self._drawn: set[int] = set()
        self._shares = [0.0] * job.request.n
        self._partials = [Partials[Preview](job.request.previews) for _ in self._shares]
        self._waiting: list[asyncio.Future[None]] = []
        job.watcher = self

    def __repr__(self) -> str:
        return f"<LiveJob {self.job!r}, {self.followers} followers, {len(self.news)} news>"

    @property
    def progress(self) -> float:
        """How far all of its pictures are together, 0 to 1."""
        return sum(self._shares) / len(self._shares)

    def current(self) -> StoredJob:
        """What is known of it by now, as it would be stored."""
        job, stored = self.job, self.stored
        started = stored.started_at
        if started is None and job.started_at is not None:
            started = stored.created_at + job.queued_seconds
        return structs.replace(
            stored, started_at=started, backend=job.backend or stored.backend, attempts=stored.attempts + job.attempts
        )

    def waits(self, why: str | None) -> None:
        """Nobody can take it for now, and why; None: it is asked for again."""
        self.waiting_for = why
        self._tell()

    def tried_again(self, job: Job) -> None:
        """The same job, from the beginning."""
        self.job = job
        job.watcher = self
        self._tell()

    # what the dispatcher tells

    def started(self, width: int, height: int) -> None:
        """A call was made; see `JobWatcher`."""
        self.size = width, height
        self._tell()

    def progressed(self, index: int, share: float, preview: Preview | None) -> None:
        """Its call is done to `share`; see `JobWatcher`."""
        if index in self._drawn:
            return
        self._shares[index] = min(1.0, max(self._shares[index], share))
        if preview is not None and self.job.request.previews:
            # engines that draw one picture after the other say how far each is
            own = share if preview.share is None else preview.share
            for number, shown in self._partials[index].offer(own, preview):
                self._add(PartialNews(index, number, shown, self.size))
        self._tell()

    def drawn(self, index: int, artifact: Artifact) -> None:
        """Picture `index` is there; see `JobWatcher`."""
        if index in self._drawn:
            return
        self._drawn.add(index)
        self._shares[index] = 1.0
        for number, shown in self._partials[index].finish():
            self._add(PartialNews(index, number, shown, self.size))
        self._on_drawn(self, index, artifact)
        self._tell()

    # how it ends

    def finished(self, index: int, artifact: Artifact) -> None:
        """Picture `index` is as it will be delivered."""
        self._add(PictureNews(index, artifact))
        self._tell()

    def succeeded(self, stored: StoredJob, artifacts: list[Artifact]) -> None:
        """It is over, and these are its pictures."""
        self.stored, self.artifacts, self.is_over = stored, artifacts, True
        self._tell()

    def failed(self, stored: StoredJob, error: GatewayError) -> None:
        """It is over, and this is what its client is told."""
        # its frames hold this job, which would hold its pictures until the collector comes by
        error.__traceback__ = None
        self.stored, self.error, self.is_over = stored, error, True
        self._tell()

    # following

    async def changed(self, since: int) -> int:
        """Wait until something has happened after `version` was `since`; the version now."""
        if self.version == since:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.append(waiter)
            try:
                await waiter
            finally:
                if waiter in self._waiting:
                    self._waiting.remove(waiter)
        return self.version

    async def outcome(self) -> StoredJob:
        """Wait for its success.

        Raises:
            GatewayError: how it failed.
        """
        while not self.is_over:
            await self.changed(self.version)
        if self.error is not None:
            raise self.error
        return self.stored

    def news_after(self, event_id: int) -> int:
        """How many of the news had come by then."""
        return bisect_right(self.news_ids, event_id)

    def _add(self, news: News) -> None:
        last = self.news_ids[-1] if self.news_ids else 0
        self.news_ids.append(max(last + 1, int(self._unix_clock() * 1_000_000)))
        self.news.append(news)

    def _tell(self) -> None:
        self.version += 1
        waiting, self._waiting = self._waiting, []
        for waiter in waiting:
            if not waiter.done():
                waiter.set_result(None)
