"""Follows a job by its events until it is over, through cut connections, and shows on standard error how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Final

from img_serving.backends.sse import EventReader
from img_serving.cli.client import Client, Refused, Unreachable
from img_serving.cli.endings import CommandFailed, printable, say
from img_serving.cli.job_words import is_over, read_record, state
from img_serving.cli.jobs import call, explained, path_of
from img_serving.config.backend import is_token

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, Task

    from img_serving.cli.job_words import SeenJob

PAUSES: Final = (0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 15.0, 15.0)
"""Seconds before each new connection in a row: together, as long as a gateway may take to start anew."""
LASTING_SECONDS: Final = 10.0
"""A connection that held for so long begins the row anew."""
PASSING: Final = frozenset({429, 502, 503, 504})
"""Refusals that may be over in a moment: a gateway that starts, or a proxy that waits for it."""
EVENT_BYTES: Final = 512 * 1024 * 1024
"""An event at most: the last one has all pictures in it where they are base64."""

BAR_CELLS: Final = 20

Tell = Callable[["SeenJob | None"], None]
"""Told where the job stands; None: the connection was lost, for now."""


def until_over(client: Client, job_id: str) -> SeenJob:
    """The job at its end.

    Raises:
        CommandFailed: there is no such job, or the gateway does not answer any more.
    """
    with shown(job_id) as tell:
        return _Listener(client, job_id, tell).until_over()


class _Listener:
    """One job's events over as many connections as it takes. `_last_id` is that of the last event that came whole."""

    def __init__(self, client: Client, job_id: str, tell: Tell) -> None:
        self._client = client
        self._job_id = job_id
        self._tell = tell
        self._last_id = ""
        self._is_heard = False

    def until_over(self) -> SeenJob:
        """Listen, and again where the connection is cut, each time behind what was heard."""
        cuts = 0
        while True:
            began = time.monotonic()
            trouble = f"{self._client.url} closed the connection"
            try:
                record = self._listen()
            except Refused as refusal:
                if not self._is_heard or refusal.status not in PASSING:
                    raise self._explained(refusal) from refusal
                trouble = str(refusal)
            except Unreachable as failure:
                if not self._is_heard:
                    raise
                trouble = str(failure)
            else:
                if record is not None:
                    return record
            cuts = 1 if time.monotonic() - began >= LASTING_SECONDS else cuts + 1
            if cuts > len(PAUSES):
                raise CommandFailed(
                    f"{self._job_id} cannot be followed: {trouble} ({cuts} times in a row). It goes on without us; "
                    f"`img-serving jobs follow {self._job_id}` tries again"
                )
            self._tell(None)
            time.sleep(PAUSES[cuts - 1])

    def _listen(self) -> SeenJob | None:
        """Over one connection: the job at its end, or None where the stream ends before."""
        reader = EventReader(EVENT_BYTES)
        waits = False
        for piece in self._client.listen(f"{path_of(self._job_id)}/events", self._last_id):
            self._is_heard = True
            try:
                events = reader.feed(piece)
            except ValueError as error:
                raise CommandFailed(f"the events cannot be read: {error}") from error
            for event in events:
                if not event.name.startswith("job."):
                    continue  # pictures
                record = read_record(event.data)
                if is_over(record):
                    return record
                waits = record.status == "queued"
                self._tell(record)
            if is_token(reader.last_id):
                self._last_id = reader.last_id
            if waits and piece.startswith(b":"):  # a sign of life, and no news
                self._look()
        return None

    def _look(self) -> None:
        """Ask where it stands in line by now: the events tell of other changes only."""
        with suppress(CommandFailed):  # the events go on
            record = read_record(call(self._client, "GET", self._job_id).body)
            if record.status == "queued":
                self._tell(record)

    def _explained(self, refusal: Refused) -> CommandFailed:
        """What to do; a request that somebody waits for on a connection is found, and yet has no events."""
        if refusal.code == "job_not_found":
            with suppress(CommandFailed):
                call(self._client, "GET", self._job_id)
                return CommandFailed(
                    f"{self._job_id} is a plain request, which has no events: "
                    f"`img-serving jobs show {self._job_id}` tells how far it is"
                )
        return explained(refusal, self._job_id)


@contextmanager
def shown(job_id: str) -> Iterator[Tell]:
    """A bar for as long as the block runs, gone afterwards; where there is no terminal, a line whenever the state changes."""
    if not sys.stderr.isatty():
        yield _Lines(job_id).tell
        return
    with _bar() as bar:
        task = bar.add_task("connecting", total=1.0, done_at=None)
        furthest = 0.0

        def tell(record: SeenJob | None) -> None:
            nonlocal furthest
            if record is None:
                bar.update(task, description="connection lost, trying again", done_at=None)
                return
            furthest = max(furthest, record.progress)  # a bar that runs back tells nobody anything
            eta = record.eta_seconds
            bar.update(
                task,
                description=printable(state(record)),
                completed=furthest,
                done_at=None if eta is None else time.monotonic() + eta,
            )

        yield tell


class _Lines:
    """Tells a log: each state once."""

    def __init__(self, job_id: str) -> None:
        self._job_id = job_id
        self._told = ""

    def tell(self, record: SeenJob | None) -> None:
        """Say it if it is new."""
        text = "connection lost, trying again" if record is None else state(record)
        if text != self._told:
            self._told = text
            say(f"{self._job_id}: {text}")


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class DoneIn(ProgressColumn):
        """Counts down between two events."""

        def render(self, task: Task) -> RenderableType:
            done_at = task.fields["done_at"]
            return Text("" if done_at is None else left(done_at - time.monotonic()))

    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(BAR_CELLS),
        TaskProgressColumn(),
        DoneIn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def left(seconds: float) -> str:
    """How long it should still take; an estimate that has passed is not a promise."""
    from img_serving.cli.job_words import brief

    return f"~{brief(seconds)} left" if seconds >= 1 else "any moment"
