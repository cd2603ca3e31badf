"""The state that survives a restart, in one SQLite file: the default of a single gateway.

All calls run on one thread of its own: SQLite serialises writers anyway, and the event loop never waits for a disk.
A file that cannot be used is reported with what to do about it; nothing is ever deleted or replaced.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from img_serving.domain.errors import GatewayError
from img_serving.domain.stored import StoredJob
from img_serving.ports import JobQuery, StoredWebhook, WebhookState
from img_serving.state import sqlite_jobs as jobs
from img_serving.state import sqlite_webhooks as webhooks

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        "CREATE TABLE backends (place INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, record BLOB NOT NULL)",
        "CREATE TABLE named_values (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    ),
    (*jobs.JOB_TABLES, *webhooks.WEBHOOK_TABLES),
)
"""What leads from each version of the file to the next. Entries are never edited once released, only added."""

_ADVICE = {
    sqlite3.SQLITE_BUSY: "another process holds it locked; stop that one, or give this gateway its own data_dir",
    sqlite3.SQLITE_LOCKED: "another process holds it locked; stop that one, or give this gateway its own data_dir",
    sqlite3.SQLITE_NOTADB: "it is not a state file; move it away to start with an empty one, or point data_dir elsewhere",
    sqlite3.SQLITE_CORRUPT: "it is damaged; restore a backup, or move it away to start with an empty one",
    sqlite3.SQLITE_FULL: "the disk is full; free some space",
    sqlite3.SQLITE_READONLY: "it cannot be written to; check the permissions of the file and of its directory",
    sqlite3.SQLITE_PERM: "no permission; check the owner and mode of the file and of its directory",
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened; check the permissions of the file and of its directory",
    sqlite3.SQLITE_IOERR: "the disk failed to read or write it; check the disk",
}
_T = TypeVar("_T")

MOST_WRITES = 512
"""Writes that share a commit at most."""


class StateError(GatewayError):
    """The state cannot be read or written; the message names the file and says what to do."""

    default_code = "state_failed"
    status = 503


@dataclass(slots=True)
class _Write:
    """One change that waits for its commit, and what came of it."""

    work: Callable[[sqlite3.Connection], Any]
    done: asyncio.Future[Any]
    value: Any = None
    error: BaseException | None = None

    def tell(self) -> None:
        """On the loop: whoever waits goes on."""
        if self.done.done():
            return  # who waited has left; what was written stays
        if self.error is not None:
            self.done.set_exception(self.error)
        else:
            self.done.set_result(self.value)


class SqliteState:
    """Keeps state in the SQLite file at `path`. What a write confirmed is on disk, also after a power cut.

    Writes that come while another is being synchronised share the next commit: a disk that takes 5 ms for one still takes
    thousands of jobs a second.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        busy_timeout_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Does no I/O yet: the file is opened (or made, mode 0600) by `open`, or else by the first call.

        `clock` gives Unix seconds: what is past its time is not found any more.
        """
        self._path = Path(path)
        self._busy_timeout_seconds = busy_timeout_seconds
        self._clock = clock
        self._writes: deque[_Write] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sqlite-state")
        self._connection: sqlite3.Connection | None = None

    async def open(self) -> None:
        """Open or make the file and bring it to the newest version.

        Raises:
            StateError: it is locked, damaged, not ours, from a newer version, or cannot be made.
        """
        await self._on_thread(lambda _: None)

    async def backends(self) -> list[bytes]:
        """The stored backend records (JSON), oldest first.

        Raises:
            StateError: see `open`; the same holds for every method.
        """

        def read(connection: sqlite3.Connection) -> list[bytes]:
            return [bytes(record) for (record,) in connection.execute("SELECT record FROM backends ORDER BY place")]

        return await self._on_thread(read)

    async def put_backend(self, name: str, record: bytes) -> None:
        """Add or replace one (it keeps its place), on disk before it returns."""
        await self._write(
            "INSERT INTO backends (name, record) VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET record = excluded.record",
            name,
            record,
        )

    async def delete_backend(self, name: str) -> None:
        """Remove one; unknown names are fine."""
        await self._write("DELETE FROM backends WHERE name = ?", name)

    async def get_value(self, key: str) -> str | None:
        """A small named value."""

        def read(connection: sqlite3.Connection) -> str | None:
            row = connection.execute("SELECT value FROM named_values WHERE key = ?", (key,)).fetchone()
            return None if row is None else str(row[0])

        return await self._on_thread(read)

    async def put_value(self, key: str, value: str) -> None:
        """Set a small named value, on disk before it returns."""
        await self._write(
            "INSERT INTO named_values (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            key,
            value,
        )

    # jobs (see `ports.JobStore`)

    async def add_job(self, job: StoredJob) -> StoredJob | None:
        """Take a new job; or return the one that has its idempotency key already."""
        now = self._clock()
        return await self._changed(lambda connection: jobs.add(connection, job, now))

    async def save_job(self, job: StoredJob, webhook: StoredWebhook | None = None) -> None:
        """Replace a job that is there and not over, and add its event to the outbox in the same transaction."""

        def save(connection: sqlite3.Connection) -> None:
            if jobs.save(connection, job) and webhook is not None:
                webhooks.insert_webhook(connection, webhook)

        await self._changed(save)

    async def find_job(self, tenant: str, job_id: str) -> StoredJob | None:
        """A tenant's job, unless it is past its `expires_at`."""
        now = self._clock()
        return await self._on_thread(lambda connection: jobs.find(connection, tenant, job_id, now))

    async def find_key(self, tenant: str, idempotency_key: str) -> StoredJob | None:
        """The job that was made with this key."""
        now = self._clock()
        return await self._on_thread(lambda connection: jobs.find_key(connection, tenant, idempotency_key, now))

    async def list_jobs(self, tenant: str, query: JobQuery) -> list[StoredJob]:
        """A tenant's jobs, newest first."""
        now = self._clock()
        return await self._on_thread(lambda connection: jobs.select(connection, tenant, query, now))

    async def unfinished_jobs(self, limit: int, after: str | None = None) -> list[StoredJob]:
        """Jobs that are not over, oldest first."""
        return await self._on_thread(lambda connection: jobs.unfinished(connection, limit, after))

    async def load_job(self, job_id: str) -> StoredJob | None:
        """A job of whatever tenant."""
        return await self._on_thread(lambda connection: jobs.load(connection, job_id))

    async def forget_expired(self, now: float) -> int:
        """Remove the jobs whose `expires_at` has passed."""
        return await self._changed(lambda connection: jobs.forget_expired(connection, now))

    # webhooks (see `ports.WebhookStore`)

    async def add_webhook(self, webhook: StoredWebhook) -> None:
        """Add an event to the outbox; one whose id is there already is left as it is."""
        await self._changed(lambda connection: webhooks.insert_webhook(connection, webhook))

    async def due_webhooks(
        self, now: float, limit: int, *, except_events: Collection[str] = (), except_hosts: Collection[str] = ()
    ) -> list[StoredWebhook]:
        """Events whose time has come: those never tried first, each kind longest due first."""
        return await self._on_thread(
            lambda connection: webhooks.due_webhooks(connection, now, limit, tuple(except_events), tuple(except_hosts))
        )

    async def next_webhook_at(self, after: float) -> float | None:
        """When the next event is due that is not due at `after` yet; None: there is none."""
        return await self._on_thread(lambda connection: webhooks.next_webhook_at(connection, after))

    async def record_webhook(
        self, event_id: str, *, attempts: int, next_at: float | None, delivered_at: float | None, last_error: str
    ) -> None:
        """Note how a try ended, on disk before it returns; an event that is gone meanwhile is fine."""
        await self._changed(
            lambda connection: webhooks.record_webhook(
                connection,
                event_id,
                attempts=attempts,
                next_at=next_at,
                delivered_at=delivered_at,
                last_error=last_error,
            )
        )

    async def find_webhooks(
        self,
        *,
        event_id: str | None = None,
        job_id: str | None = None,
        state: WebhookState | None = None,
        limit: int,
        after: str | None = None,
    ) -> list[StoredWebhook]:
        """Events, newest first, that have all of what is given; those older than the event `after`."""
        return await self._on_thread(
            lambda connection: webhooks.find_webhooks(
                connection, event_id=event_id, job_id=job_id, state=state, limit=limit, after=after
            )
        )

    async def requeue_webhook(self, event_id: str, now: float) -> bool:
        """Have an event delivered (again), from the beginning of its schedule; False: there is no such event."""
        return await self._changed(lambda connection: webhooks.requeue_webhook(connection, event_id, now))

    async def sweep_webhooks(self, before: float) -> int:
        """Forget events that are not tried any more and were queued before then; returns how many, 1000 a call at most."""
        return await self._changed(lambda connection: webhooks.sweep_webhooks(connection, before))

    async def close(self) -> None:
        """Finish what is being written and let go of the file. Closing twice is fine."""
        with contextlib.suppress(RuntimeError):
            await asyncio.get_running_loop().run_in_executor(self._thread, self._disconnect)
        await asyncio.to_thread(self._thread.shutdown)

    def __repr__(self) -> str:
        return f"<SqliteState {self._path}>"

    async def _write(self, statement: str, *values: str | bytes) -> None:
        def write(connection: sqlite3.Connection) -> None:
            connection.execute(statement, values)

        await self._changed(write)

    async def _changed(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        """Do `work` in a transaction, perhaps together with others; on disk before it returns."""
        write = _Write(work, asyncio.get_running_loop().create_future())
        self._writes.append(write)
        try:
            self._thread.submit(self._flush)
        except RuntimeError:
            raise self._is_closed() from None
        value: _T = await write.done
        return value

    def _is_closed(self) -> StateError:
        return StateError(f"the state file {self._path} is closed: the gateway is stopping")

    async def _on_thread(self, work: Callable[[sqlite3.Connection], _T]) -> _T:
        def run() -> _T:
            try:
                if self._connection is None:
                    self._connection = self._connect()
                return work(self._connection)
            except (sqlite3.Error, OSError) as error:
                raise self._told(error) from error

        try:
            running = asyncio.get_running_loop().run_in_executor(self._thread, run)
        except RuntimeError:
            raise self._is_closed() from None
        return await running

    # from here on: the one thread

    def _flush(self) -> None:
        """Write all that waits, in one transaction; what came too late finds nothing to do when its turn is."""
        writes: list[_Write] = []
        while self._writes and len(writes) < MOST_WRITES:
            writes.append(self._writes.popleft())
        if not writes:
            return
        try:
            if self._connection is None:
                self._connection = self._connect()
            self._commit(self._connection, writes)
        except BaseException as error:  # whatever it is, nobody must wait for ever
            told = self._told(error)
            for write in writes:
                write.error = told
        for write in writes:
            with contextlib.suppress(RuntimeError):  # its loop has ended
                write.done.get_loop().call_soon_threadsafe(write.tell)

    def _commit(self, connection: sqlite3.Connection, writes: list[_Write]) -> None:
        """All in one transaction; one that fails by itself does not take the others along."""
        connection.execute("BEGIN IMMEDIATE")
        try:
            for write in writes:
                connection.execute("SAVEPOINT one")
                try:
                    write.value = write.work(connection)
                except sqlite3.IntegrityError as error:
                    write.error = self._explained(error)
                    connection.execute("ROLLBACK TO one")
                connection.execute("RELEASE one")
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _told(self, error: BaseException) -> BaseException:
        if isinstance(error, sqlite3.Error):
            return self._explained(error)
        if isinstance(error, OSError):
            reason = os.strerror(error.errno) if error.errno else str(error)
            return StateError(
                f"the state file {self._path} cannot be made or opened: {reason}; check data_dir and its permissions"
            )
        return error

    def _explained(self, error: sqlite3.Error) -> StateError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        advice = _ADVICE.get(code, "restore a backup, or move it away to start with an empty one")
        return StateError(f"the state file {self._path} cannot be used ({error}): {advice}. Nothing was deleted.")

    def _connect(self) -> sqlite3.Connection:
        self._make_private()
        connection = sqlite3.connect(self._path, timeout=self._busy_timeout_seconds, isolation_level=None)
        try:
            # Before anything that could write: a file from a newer version stays as it is.
            self._refuse_newer(connection)
            self._refuse_damaged(connection)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            self._migrate(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_private(self) -> None:
        """The file holds key hashes and backends' credentials: nobody else reads it, whatever the umask.

        SQLite gives its -wal and -shm files the same mode. An existing file is not opened here: closing it again would
        drop the locks of another connection of this process.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        except FileExistsError:
            if self._path.stat().st_mode & 0o077:
                self._path.chmod(0o600)
            return
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # some file systems cannot, and SQLite does it again with its own files
                os.fsync(directory)
        finally:
            os.close(directory)

    def _refuse_newer(self, connection: sqlite3.Connection) -> int:
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > len(MIGRATIONS):
            raise StateError(
                f"the state file {self._path} has version {version}, this program knows up to {len(MIGRATIONS)}: run the newer "
                "program, or give this one another data_dir. The file was not changed."
            )
        return version

    def _refuse_damaged(self, connection: sqlite3.Connection) -> None:
        fault = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if fault != "ok":
            raise StateError(
                f"the state file {self._path} is damaged ({fault}): restore a backup, or move it away to start with an empty "
                "one. Nothing was deleted."
            )

    def _migrate(self, connection: sqlite3.Connection) -> None:
        if self._refuse_newer(connection) == len(MIGRATIONS):
            return
        connection.execute("BEGIN IMMEDIATE")
        try:
            # Asked again now that nobody else can write: another gateway may have been first.
            for script in MIGRATIONS[self._refuse_newer(connection) :]:
                for statement in script:
                    connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
