"""The SQLite file: private, durable, migrated, and never harmed when it cannot be used."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from img_serving.ports import StoredWebhook
from img_serving.state import sqlite
from img_serving.state.sqlite import MIGRATIONS, SqliteState, StateError
from img_serving.state.sqlite_webhooks import insert_webhook


def run(path: Path, check: Callable[[SqliteState], Awaitable[None]], *, busy_timeout_seconds: float = 5.0) -> None:
    async def main() -> None:
        state = SqliteState(path, busy_timeout_seconds=busy_timeout_seconds)
        try:
            await check(state)
        finally:
            await state.close()

    asyncio.run(main())


async def opens(state: SqliteState) -> None:
    await state.open()


async def writes(state: SqliteState) -> None:
    await state.put_value("key", "value")


def refused(path: Path, match: str) -> str:
    """Opening says why it fails, and the file is byte for byte what it was."""
    before = path.read_bytes()
    said: list[str] = []

    async def check(state: SqliteState) -> None:
        with pytest.raises(StateError, match=match) as caught:
            await state.open()
        said.append(str(caught.value))

    run(path, check, busy_timeout_seconds=0)
    assert path.read_bytes() == before
    assert str(path) in said[0]
    return said[0]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_what_was_written_is_there_after_a_restart(tmp_path):
    path = tmp_path / "data" / "state.db"

    async def check(state: SqliteState) -> None:
        await state.put_value("key", "value")
        await state.put_backend("one", b"{}")

    async def check_again(state: SqliteState) -> None:
        assert await state.get_value("key") == "value"
        assert await state.backends() == [b"{}"]

    run(path, check)
    run(path, check_again)


def test_nobody_else_may_read_the_file_or_its_journal_whatever_the_umask(tmp_path):
    async def check(state: SqliteState) -> None:
        await state.put_value("key", "value")
        files = sorted(tmp_path.iterdir())
        assert [file.name for file in files] == ["state.db", "state.db-shm", "state.db-wal"]
        assert [mode(file) for file in files] == [0o600] * 3

    before = os.umask(0)
    try:
        run(tmp_path / "state.db", check)
    finally:
        os.umask(before)


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path):
    path = tmp_path / "state.db"
    path.touch(mode=0o644)
    run(path, writes)
    assert mode(path) == 0o600


def test_writes_are_durable_and_readers_are_not_blocked(tmp_path):
    async def check(state: SqliteState) -> None:
        await state.open()
        pragmas = await state._on_thread(
            lambda connection: [
                connection.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("journal_mode", "synchronous", "busy_timeout")
            ]
        )
        assert pragmas == ["wal", 2, 5000]

    run(tmp_path / "state.db", check)


def test_a_file_that_is_no_database_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.db"
    path.write_bytes(b"my diary, not a database\n" * 100)
    assert "move it away" in refused(path, "not a state file")


def test_a_damaged_file_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.db"

    async def check(state: SqliteState) -> None:
        for index in range(200):
            await state.put_value(f"key {index}", "x" * 500)

    run(path, check)
    with path.open("r+b") as file:
        file.seek(8192)
        file.write(b"\xa5" * 20000)
    assert "restore a backup" in refused(path, "damaged")


def test_a_file_cut_short_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.db"

    async def check(state: SqliteState) -> None:
        for index in range(200):
            await state.put_value(f"key {index}", "x" * 500)

    run(path, check)
    os.truncate(path, path.stat().st_size // 2)
    refused(path, "damaged")


def test_a_file_that_another_process_holds_locked_is_said_so_and_works_once_it_lets_go(tmp_path):
    path = tmp_path / "state.db"
    run(path, writes)
    with closing(sqlite3.connect(path, isolation_level=None)) as other:

        async def check(state: SqliteState) -> None:
            await state.open()
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StateError, match="another process holds it locked"):
                await state.put_value("key", "mine")
            other.execute("ROLLBACK")
            await state.put_value("key", "mine")
            assert await state.get_value("key") == "mine"

        run(path, check, busy_timeout_seconds=0)


def test_a_locked_file_does_not_open_and_opens_later(tmp_path):
    path = tmp_path / "state.db"
    path.touch()
    with closing(sqlite3.connect(path, isolation_level=None)) as other:

        async def check(state: SqliteState) -> None:
            other.execute("BEGIN EXCLUSIVE")
            with pytest.raises(StateError, match="locked"):
                await state.open()
            other.execute("ROLLBACK")
            await state.put_value("key", "mine")

        run(path, check, busy_timeout_seconds=0)


def test_two_gateways_on_one_file_see_each_others_writes(tmp_path):
    async def main() -> None:
        one, two = SqliteState(tmp_path / "state.db"), SqliteState(tmp_path / "state.db")
        await asyncio.gather(one.open(), two.open())
        await asyncio.gather(one.put_value("one", "1"), two.put_value("two", "2"))
        assert await one.get_value("two") == "2"
        assert await two.get_value("one") == "1"
        await one.close()
        await two.close()

    asyncio.run(main())


def test_a_directory_that_cannot_be_made_is_said_so(tmp_path):
    (tmp_path / "data").write_text("a file")

    async def check(state: SqliteState) -> None:
        with pytest.raises(StateError, match="check data_dir"):
            await state.open()

    run(tmp_path / "data" / "state.db", check)


@pytest.mark.skipif(os.geteuid() == 0, reason="ROOT MAY WRITE EVERYWHERE: run as a normal user to see this proven")
def test_a_file_that_may_not_be_written_is_said_so(tmp_path):
    path = tmp_path / "state.db"
    run(path, opens)
    path.chmod(0o400)

    async def check(state: SqliteState) -> None:
        with pytest.raises(StateError, match=r"cannot be written|permission"):
            await state.put_value("key", "value")

    run(path, check)


def test_a_file_from_a_newer_version_is_refused_and_kept(tmp_path):
    path = tmp_path / "state.db"
    run(path, opens)
    with closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA user_version = 99")
    assert "run the newer program" in refused(path, "version 99")


def test_an_older_file_is_migrated_and_keeps_what_it_holds(tmp_path, monkeypatch):
    path = tmp_path / "state.db"
    run(path, writes)
    newer = (*MIGRATIONS, ("CREATE TABLE extra (x)", "INSERT INTO extra VALUES (1)"))
    monkeypatch.setattr(sqlite, "MIGRATIONS", newer)

    async def check(state: SqliteState) -> None:
        assert await state.get_value("key") == "value"

    run(path, check)
    run(path, check)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("PRAGMA user_version").fetchone() == (len(newer),)
        assert other.execute("SELECT * FROM extra").fetchall() == [(1,)]


def test_a_migration_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "state.db"
    run(path, writes)
    monkeypatch.setattr(sqlite, "MIGRATIONS", (*MIGRATIONS, ("CREATE TABLE extra (x)", "NONSENSE")))

    async def fails(state: SqliteState) -> None:
        with pytest.raises(StateError, match="syntax error"):
            await state.open()

    async def holds(state: SqliteState) -> None:
        assert await state.get_value("key") == "value"

    run(path, fails)
    monkeypatch.undo()
    run(path, holds)
    with closing(sqlite3.connect(path)) as other:
        assert other.execute("SELECT name FROM sqlite_master WHERE name = 'extra'").fetchall() == []


def test_an_event_is_added_in_the_transaction_that_ends_its_job(tmp_path):
    event = StoredWebhook(
        event_id="evt_1",
        job_id="job_1",
        tenant="team",
        url="https://hooks.test/",
        type="job.succeeded",
        created_at=1.0,
        payload=b"{}",
        queued_at=1.0,
        next_at=1.0,
    )

    async def check(state: SqliteState) -> None:
        def undone(connection: sqlite3.Connection) -> None:
            connection.execute("BEGIN IMMEDIATE")
            insert_webhook(connection, event)
            connection.execute("ROLLBACK")

        await state._on_thread(undone)
        assert await state.due_webhooks(9.0, 9) == []
        await state._on_thread(lambda connection: insert_webhook(connection, event))
        await state._on_thread(lambda connection: insert_webhook(connection, event))
        assert await state.due_webhooks(9.0, 9) == [event]

    run(tmp_path / "state.db", check)


def plan_of(statement: str, connection: sqlite3.Connection) -> list[str]:
    return [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {statement}")]


def test_due_events_are_looked_up_in_an_index_however_many_there_are(tmp_path):
    seen: list[str] = []

    async def check(state: SqliteState) -> None:
        await state._on_thread(lambda connection: connection.set_trace_callback(seen.append))
        await state.due_webhooks(9.0, 9, except_events=["evt_1"], except_hosts=["a.test", "b.test"])
        await state.next_webhook_at(9.0)
        await state.sweep_webhooks(9.0)
        await state._on_thread(lambda connection: connection.set_trace_callback(None))
        statements = [one for one in seen if "webhooks" in one]
        assert len(statements) == 5
        for statement in statements:
            plan = " / ".join(await state._on_thread(partial(plan_of, statement)))
            assert "INDEX webhooks_" in plan, plan
            assert "SCAN webhooks" not in plan
            assert "TEMP B-TREE" not in plan, plan

    run(tmp_path / "state.db", check)


def test_a_killed_process_loses_nothing_that_was_acknowledged(tmp_path):
    path = tmp_path / "state.db"
    program = """
import asyncio, sys
from img_serving.state.sqlite import SqliteState

async def main():
    state = SqliteState(sys.argv[1])
    for index in range(1_000_000):
        await state.put_value(f"key {index}", str(index))
        print(index, flush=True)

asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = [int(next(process.stdout)) for _ in range(100)]
        process.kill()
        acknowledged += [int(line) for line in process.stdout.read().splitlines(keepends=True) if line.endswith("\n")]

    async def check(state: SqliteState) -> None:
        for index in acknowledged:
            assert await state.get_value(f"key {index}") == str(index)
        await state.put_value("after", "all")

    run(path, check)


def test_a_file_of_the_first_version_is_brought_up_to_date_and_keeps_what_it_has(tmp_path):
    path = tmp_path / "state.db"
    with closing(sqlite3.connect(path)) as old:
        for statement in MIGRATIONS[0]:
            old.execute(statement)
        old.execute("INSERT INTO backends (name, record) VALUES ('forge', X'78')")
        old.execute("INSERT INTO named_values VALUES ('admin_key_hashes', 'ab')")
        old.execute("PRAGMA user_version = 1")
        old.commit()

    async def main():
        state = SqliteState(path)
        await state.open()
        assert await state.backends() == [b"x"]
        assert await state.get_value("admin_key_hashes") == "ab"
        assert await state.unfinished_jobs(10) == []
        assert await state.due_webhooks(0.0, 10) == []
        await state.close()

    asyncio.run(main())
    with closing(sqlite3.connect(path)) as new:
        assert new.execute("PRAGMA user_version").fetchone()[0] == len(MIGRATIONS)
