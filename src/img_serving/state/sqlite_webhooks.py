"""The outbox of webhooks in SQLite: its table and every statement that is made on it, for the one thread that owns the file."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from typing import Final

from img_serving.ports import StoredWebhook, WebhookState

WEBHOOK_TABLES: Final = (
    """CREATE TABLE webhooks (
      place INTEGER PRIMARY KEY AUTOINCREMENT, event_id TEXT NOT NULL UNIQUE, job_id TEXT NOT NULL, tenant TEXT NOT NULL,
      url TEXT NOT NULL, host TEXT NOT NULL, type TEXT NOT NULL, created_at REAL NOT NULL, queued_at REAL NOT NULL,
      next_at REAL, attempts INTEGER NOT NULL, delivered_at REAL, last_error TEXT NOT NULL, payload BLOB NOT NULL
    )""",
    # with the host in it, events of busy receivers are passed over without a look at their rows
    "CREATE INDEX webhooks_due ON webhooks (attempts > 0, next_at, host) WHERE next_at IS NOT NULL",
    "CREATE INDEX webhooks_ended ON webhooks (queued_at) WHERE next_at IS NULL",
    "CREATE INDEX webhooks_of_job ON webhooks (job_id)",
)
"""What makes the table, as one step of `MIGRATIONS`. `host` is the URL's."""

SWEPT_AT_ONCE: Final = 1000
"""Rows forgotten a call, so that nobody else waits long for the thread."""

_COLUMNS: Final = (
    "event_id, job_id, tenant, url, type, created_at, payload, queued_at, next_at, attempts, delivered_at, last_error"
)
_CONDITIONS: Final[dict[WebhookState, str]] = {
    "pending": "next_at IS NOT NULL",
    "delivered": "next_at IS NULL AND delivered_at IS NOT NULL",
    "failed": "next_at IS NULL AND delivered_at IS NULL",
}


def insert_webhook(connection: sqlite3.Connection, webhook: StoredWebhook) -> None:
    """Add an event, inside whatever transaction is open; one whose id is there already is left as it is."""
    connection.execute(
        f"INSERT INTO webhooks ({_COLUMNS}, host) "  # noqa: S608 - names of our own, values are bound
        f"VALUES ({', '.join('?' * 13)}) ON CONFLICT (event_id) DO NOTHING",
        (
            webhook.event_id,
            webhook.job_id,
            webhook.tenant,
            webhook.url,
            webhook.type,
            webhook.created_at,
            webhook.payload,
            webhook.queued_at,
            webhook.next_at,
            webhook.attempts,
            webhook.delivered_at,
            webhook.last_error,
            webhook.host,
        ),
    )


def due_webhooks(
    connection: sqlite3.Connection,
    now: float,
    limit: int,
    except_events: Collection[str],
    except_hosts: Collection[str],
) -> list[StoredWebhook]:
    """See `WebhookStore.due_webhooks`."""
    found: list[StoredWebhook] = []
    for is_retry in (0, 1):
        rows = connection.execute(
            f"SELECT {_COLUMNS} FROM webhooks "  # noqa: S608 - names of our own, values are bound
            "WHERE (attempts > 0) = ? AND next_at IS NOT NULL AND next_at <= ? "
            f"AND host NOT IN ({_marks(except_hosts)}) AND event_id NOT IN ({_marks(except_events)}) "
            "ORDER BY next_at LIMIT ?",
            (is_retry, now, *except_hosts, *except_events, limit - len(found)),
        )
        found += map(_webhook, rows)
    return found


def next_webhook_at(connection: sqlite3.Connection, after: float) -> float | None:
    """See `WebhookStore.next_webhook_at`."""
    moments = [
        connection.execute(
            "SELECT min(next_at) FROM webhooks WHERE (attempts > 0) = ? AND next_at IS NOT NULL AND next_at > ?",
            (is_retry, after),
        ).fetchone()[0]
        for is_retry in (0, 1)
    ]
    return min((one for one in moments if one is not None), default=None)


def record_webhook(
    connection: sqlite3.Connection,
    event_id: str,
    *,
    attempts: int,
    next_at: float | None,
    delivered_at: float | None,
    last_error: str,
) -> None:
    """See `WebhookStore.record_webhook`."""
    connection.execute(
        "UPDATE webhooks SET attempts = ?, next_at = ?, delivered_at = ?, last_error = ? WHERE event_id = ?",
        (attempts, next_at, delivered_at, last_error, event_id),
    )


def find_webhooks(
    connection: sqlite3.Connection,
    *,
    event_id: str | None,
    job_id: str | None,
    state: WebhookState | None,
    limit: int,
    after: str | None,
) -> list[StoredWebhook]:
    """See `WebhookStore.find_webhooks`."""
    conditions, values = ["TRUE"], list[str | int]()
    for column, value in (("event_id", event_id), ("job_id", job_id)):
        if value is not None:
            conditions.append(f"{column} = ?")
            values.append(value)
    if state is not None:
        conditions.append(_CONDITIONS[state])
    if after is not None:
        conditions.append("place < (SELECT place FROM webhooks WHERE event_id = ?)")
        values.append(after)
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM webhooks "  # noqa: S608 - names of our own, values are bound
        f"WHERE {' AND '.join(conditions)} ORDER BY place DESC LIMIT ?",
        (*values, limit),
    )
    return [_webhook(row) for row in rows]


def requeue_webhook(connection: sqlite3.Connection, event_id: str, now: float) -> bool:
    """See `WebhookStore.requeue_webhook`."""
    done = connection.execute(
        "UPDATE webhooks SET queued_at = ?, next_at = ?, attempts = 0, delivered_at = NULL, last_error = '' "
        "WHERE event_id = ?",
        (now, now, event_id),
    )
    return done.rowcount > 0


def sweep_webhooks(connection: sqlite3.Connection, before: float) -> int:
    """See `WebhookStore.sweep_webhooks`."""
    done = connection.execute(
        "DELETE FROM webhooks WHERE place IN "
        "(SELECT place FROM webhooks WHERE next_at IS NULL AND queued_at < ? ORDER BY queued_at LIMIT ?)",
        (before, SWEPT_AT_ONCE),
    )
    return done.rowcount


def _marks(values: Collection[str]) -> str:
    return ", ".join("?" * len(values))


def _webhook(
    row: tuple[str, str, str, str, str, float, bytes, float, float | None, int, float | None, str],
) -> StoredWebhook:
    event_id, job_id, tenant, url, kind, created_at, payload, queued_at, next_at, attempts, delivered_at, last_error = (
        row
    )
    return StoredWebhook(
        event_id=event_id,
        job_id=job_id,
        tenant=tenant,
        url=url,
        type=kind,
        created_at=created_at,
        payload=bytes(payload),
        queued_at=queued_at,
        next_at=next_at,
        attempts=attempts,
        delivered_at=delivered_at,
        last_error=last_error,
    )
