"""The table of durable jobs in SQLite: plain functions on a connection, for the one thread that has it.

A job is one row: what is searched for in columns of its own, all of it as MessagePack in `record`.
"""

from __future__ import annotations

import logging
import sqlite3
from itertools import islice

import msgspec

from img_serving.domain.stored import OVER, StoredJob
from img_serving.ports import JobQuery

log = logging.getLogger(__name__)

JOB_TABLES: tuple[str, ...] = (
    """CREATE TABLE jobs (
        place INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, tenant TEXT NOT NULL, operation TEXT NOT NULL,
        status TEXT NOT NULL, is_over INTEGER NOT NULL, request_id TEXT NOT NULL, idempotency_key TEXT, expires_at REAL,
        record BLOB NOT NULL)""",
    "CREATE INDEX jobs_of_tenant ON jobs (tenant, place)",
    "CREATE INDEX jobs_by_request ON jobs (tenant, request_id)",
    "CREATE UNIQUE INDEX jobs_by_key ON jobs (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL",
    "CREATE INDEX jobs_unfinished ON jobs (place) WHERE is_over = 0",
    "CREATE INDEX jobs_expiring ON jobs (expires_at) WHERE expires_at IS NOT NULL",
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StoredJob).decode


def add(connection: sqlite3.Connection, job: StoredJob, now: float) -> StoredJob | None:
    """Insert a job; or return the one that holds its idempotency key, unless that is past its time."""
    if job.idempotency_key is not None:
        holder = find_key(connection, job.tenant, job.idempotency_key, now)
        if holder is not None:
            return holder
        connection.execute(
            "UPDATE jobs SET idempotency_key = NULL WHERE tenant = ? AND idempotency_key = ?",
            (job.tenant, job.idempotency_key),
        )
    connection.execute(
        "INSERT INTO jobs (id, tenant, operation, status, is_over, request_id, idempotency_key, expires_at, record) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (
            job.id,
            job.tenant,
            job.request.operation,
            job.status,
            job.is_over,
            job.request_id,
            job.idempotency_key,
            job.expires_at,
            _encode(job),
        ),
    )
    return None


def save(connection: sqlite3.Connection, job: StoredJob) -> bool:
    """Replace a job that is there and not over; whether there is one."""
    changed = connection.execute(
        "UPDATE jobs SET status = ?, is_over = ?, expires_at = ?, idempotency_key = ?, record = ? "
        "WHERE id = ? AND is_over = 0",
        (job.status, job.is_over, job.expires_at, job.idempotency_key, _encode(job), job.id),
    )
    return changed.rowcount > 0


def find(connection: sqlite3.Connection, tenant: str, job_id: str, now: float) -> StoredJob | None:
    """A tenant's job."""
    return _one(
        connection.execute(
            "SELECT record FROM jobs WHERE id = ? AND tenant = ? AND (expires_at IS NULL OR expires_at > ?)",
            (job_id, tenant, now),
        )
    )


def find_key(connection: sqlite3.Connection, tenant: str, idempotency_key: str, now: float) -> StoredJob | None:
    """The job that was made with this key."""
    return _one(
        connection.execute(
            "SELECT record FROM jobs WHERE tenant = ? AND idempotency_key = ? AND (expires_at IS NULL OR expires_at > ?)",
            (tenant, idempotency_key, now),
        )
    )


def load(connection: sqlite3.Connection, job_id: str) -> StoredJob | None:
    """A job of whatever tenant."""
    return _one(connection.execute("SELECT record FROM jobs WHERE id = ?", (job_id,)))


def select(connection: sqlite3.Connection, tenant: str, query: JobQuery, now: float) -> list[StoredJob]:
    """A tenant's jobs, newest first."""
    text = "SELECT record FROM jobs WHERE tenant = ? AND (expires_at IS NULL OR expires_at > ?)"
    values: list[str | float] = [tenant, now]
    is_open = query.status is not None and query.status not in OVER
    if is_open:
        text += " AND is_over = 0"
    asked = {
        "status": None if is_open else query.status,
        "operation": query.operation,
        "idempotency_key": query.idempotency_key,
        "request_id": query.request_id,
    }
    for column, value in asked.items():
        if value is not None:
            text += f" AND {column} = ?"  # the names are ours, the values travel apart
            values.append(value)
    if query.after is not None:
        text += " AND place < (SELECT place FROM jobs WHERE id = ? AND tenant = ?)"
        values += [query.after, tenant]
    rows = connection.execute(text + " ORDER BY place DESC", values)
    return list(islice(filter(None, (_read(record) for (record,) in rows)), query.limit))


def unfinished(connection: sqlite3.Connection, limit: int, after: str | None) -> list[StoredJob]:
    """The jobs that are not over, oldest first."""
    found: list[StoredJob] = []
    rows = connection.execute(
        "SELECT id, record FROM jobs WHERE is_over = 0 AND place > coalesce((SELECT place FROM jobs WHERE id = ?), 0) "
        "ORDER BY place",
        (after,),
    )
    for job_id, record in rows:
        job = _read(record)
        if job is None:
            log.error("the record of job %s cannot be read: damaged, or from a newer version; it is left", job_id)
            continue
        found.append(job)
        if len(found) == limit:
            break
    return found


def forget_expired(connection: sqlite3.Connection, now: float) -> int:
    """Remove the jobs whose time has passed."""
    return connection.execute("DELETE FROM jobs WHERE expires_at <= ?", (now,)).rowcount


def _one(rows: sqlite3.Cursor) -> StoredJob | None:
    row = rows.fetchone()
    return None if row is None else _read(row[0])


def _read(record: bytes) -> StoredJob | None:
    """A record; None where it cannot be read: it is damaged, or from a newer program. One such row is not the end of all."""
    try:
        return _decode(record)
    except (msgspec.DecodeError, ValueError):
        return None
