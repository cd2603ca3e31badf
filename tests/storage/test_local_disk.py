"""The local disk: durable, atomic, clear about what is wrong, and blind to files that are not its own."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from img_serving.domain.errors import NotFound, StorageFailed
from img_serving.storage import local_disk
from img_serving.storage.local_disk import STALE_TEMPORARY_SECONDS, LocalDiskStore
from img_serving.storage.memory import MemoryStore

NOW = 1_700_000_000.0
DIGITS = "0123456789abcdef" * 2
NAME = f"img-{DIGITS}"


def run(
    directory: Path,
    check: Callable[[LocalDiskStore], Awaitable[None]],
    *,
    ttl_seconds: float | None = None,
    max_bytes: int = 0,
) -> None:
    async def main() -> None:
        store = LocalDiskStore(directory, ttl_seconds=ttl_seconds, max_bytes=max_bytes, clock=lambda: NOW)
        try:
            await check(store)
        finally:
            store.close()

    asyncio.run(main())


def aged(path: Path, seconds: float, data: bytes = b"x") -> Path:
    path.write_bytes(data)
    os.utime(path, (NOW - seconds, NOW - seconds))
    return path


def failing_after(count: int, error: int) -> Callable[[int, memoryview], int]:
    """An `os.write` that takes `count` bytes a call, once, and then fails."""
    calls = 0

    def write(file: int, data: memoryview) -> int:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise OSError(error, os.strerror(error))
        return os.write(file, data[:count])

    return write


def replaced_os(**functions: object) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(os), **functions})


def test_the_directory_is_made_with_its_parents(tmp_path):
    async def check(store):
        assert not (tmp_path / "a").exists()
        await store.prepare()
        assert list((tmp_path / "a" / "b").iterdir()) == []

    run(tmp_path / "a" / "b", check)


def test_a_directory_that_is_a_file_is_named_in_the_error(tmp_path):
    (tmp_path / "pictures").write_text("mine")

    async def check(store):
        with pytest.raises(StorageFailed, match=r"pictures: it is not a directory"):
            await store.prepare()
        with pytest.raises(StorageFailed, match=r"pictures: it is not a directory"):
            await store.put(b"x", "png")
        assert await store.find(f"{NAME}.png") is None
        assert await store.sweep() == 0

    run(tmp_path / "pictures", check)
    assert (tmp_path / "pictures").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="ROOT MAY WRITE EVERYWHERE: run as a normal user to see this proven")
def test_a_directory_without_permission_is_said_so(tmp_path):
    tmp_path.chmod(0o500)
    try:

        async def check(store):
            with pytest.raises(StorageFailed, match="no permission"):
                await store.prepare()
            with pytest.raises(StorageFailed, match="no permission"):
                await store.put(b"x", "png")

        run(tmp_path, check)
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "quota"),
        (errno.EIO, "Input/output error"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_a_write_that_fails_midway_says_why_and_leaves_no_file(tmp_path, monkeypatch, error, reason):
    async def check(store):
        monkeypatch.setattr(local_disk, "os", replaced_os(write=failing_after(1000, error)))
        with pytest.raises(StorageFailed, match=reason) as caught:
            await store.put(bytes(5000), "png")
        assert str(tmp_path) in caught.value.message
        assert list(tmp_path.iterdir()) == []
        assert (store.snapshot().failures, store.snapshot().stored) == (1, 0)
        monkeypatch.undo()
        await store.put(bytes(5000), "png")  # and the store goes on once there is room

    run(tmp_path, check)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EROFS])
def test_a_file_that_cannot_be_opened_is_a_storage_failure(tmp_path, monkeypatch, error):
    def refuse(*args):
        raise OSError(error, os.strerror(error))

    async def check(store):
        stored = await store.put(b"x", "png")
        monkeypatch.setattr(local_disk, "os", replaced_os(open=refuse))
        with pytest.raises(StorageFailed):
            await store.put(b"x", "png")
        with pytest.raises(StorageFailed):
            await anext(store.read(stored.name, 0, 1))

    run(tmp_path, check)


def test_a_directory_that_cannot_be_synced_counts_as_not_stored(tmp_path, monkeypatch):
    synced = 0

    def fail_second(file):
        nonlocal synced
        synced += 1
        if synced == 2:
            raise OSError(errno.EIO, "Input/output error")

    async def check(store):
        monkeypatch.setattr(local_disk, "os", replaced_os(fsync=fail_second))
        with pytest.raises(StorageFailed):
            await store.put(b"x", "png")
        assert list(tmp_path.iterdir()) == []

    run(tmp_path, check)


def test_short_writes_are_continued(tmp_path, monkeypatch):
    async def check(store):
        monkeypatch.setattr(local_disk, "os", replaced_os(write=lambda file, data: os.write(file, data[:7])))
        stored = await store.put(b"0123456789" * 10, "png")
        assert (tmp_path / stored.name).read_bytes() == b"0123456789" * 10

    run(tmp_path, check)


def test_a_real_limit_on_the_file_size_fails_cleanly(tmp_path):
    """In a process of its own: the limit is the kernel's, not a stand-in's."""
    program = """
import asyncio, resource, signal, sys
from img_serving.domain.errors import StorageFailed
from img_serving.storage.local_disk import LocalDiskStore

async def main():
    store = LocalDiskStore(sys.argv[1], ttl_seconds=None, max_bytes=0)
    await store.prepare()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        await store.put(bytes(200_000), "png")
    except StorageFailed as error:
        print(error.message)
    await store.put(bytes(50_000), "png")
    store.close()

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True, timeout=60
    )
    assert "larger than a file may be" in done.stdout
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [50_000]


def test_a_directory_removed_while_running_is_made_again(tmp_path):
    directory = tmp_path / "pictures"

    async def check(store):
        await store.prepare()
        first = await store.put(b"x", "png")
        (directory / first.name).unlink()
        directory.rmdir()
        assert await store.find(first.name) is None
        assert await store.sweep() == 0
        second = await store.put(b"y", "png")
        assert (directory / second.name).read_bytes() == b"y"

    run(directory, check)


def test_a_picture_that_vanishes_between_find_and_read_is_not_found(tmp_path):
    async def check(store):
        stored = await store.put(b"x", "png")
        (tmp_path / stored.name).unlink()
        with pytest.raises(NotFound, match="gone"):
            await anext(store.read(stored.name, 0, 1))

    run(tmp_path, check)


def test_a_picture_cut_short_by_somebody_is_not_passed_off_as_whole(tmp_path):
    async def check(store):
        stored = await store.put(bytes(100), "png")
        os.truncate(tmp_path / stored.name, 40)
        reader = store.read(stored.name, 0, 100)
        assert len(await anext(reader)) == 40
        with pytest.raises(StorageFailed, match="ends before byte 100"):
            await anext(reader)

    run(tmp_path, check)


def test_a_users_own_files_are_never_swept_or_served(tmp_path):
    mine = [
        aged(tmp_path / name, 10_000_000)
        for name in (
            "holiday.png",
            "notes.txt",
            ".hidden.part",
            f"{NAME}.gif",
            f"{NAME.upper()}.png",
            f"{NAME}.png.bak",
            f".{NAME}.part.old",
            f"{NAME}0.png",
        )
    ]
    (tmp_path / f"{NAME}.webp").mkdir()

    async def check(store):
        assert await store.sweep() == 0
        for file in mine:
            assert file.exists()
            assert await store.find(file.name) is None
        assert await store.find(f"{NAME}.webp") is None
        assert (tmp_path / f"{NAME}.webp").is_dir()

    run(tmp_path, check, ttl_seconds=1, max_bytes=1)


def test_a_symbolic_link_with_one_of_our_names_is_neither_followed_nor_swept(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    directory = tmp_path / "pictures"
    directory.mkdir()
    link = directory / f"{NAME}.png"
    link.symlink_to(secret)

    async def check(store):
        assert await store.find(link.name) is None
        with pytest.raises(NotFound):
            await anext(store.read(link.name, 0, 6))
        assert await store.sweep() == 0

    run(directory, check, ttl_seconds=0.001, max_bytes=1)
    assert link.is_symlink()


def test_our_own_stale_temporary_files_are_swept_and_fresh_ones_are_not(tmp_path):
    stale = aged(tmp_path / f".{NAME}.part", STALE_TEMPORARY_SECONDS)
    fresh = aged(tmp_path / f".img-{DIGITS[::-1]}.part", STALE_TEMPORARY_SECONDS - 1)

    async def check(store):
        assert await store.sweep() == 0  # a temporary file is no picture
        assert not stale.exists()
        assert fresh.exists()

    run(tmp_path, check)


@pytest.mark.parametrize("is_ours_alone", [True, False])
def test_where_nobody_else_writes_what_was_half_written_goes_at_the_start_and_nobody_else_reads(
    tmp_path, is_ours_alone
):
    left = aged(tmp_path / f".{NAME}.part", 1)
    other, whole = aged(tmp_path / ".other.part", 1), aged(tmp_path / f"{NAME}.png", 1)

    async def main():
        store = LocalDiskStore(tmp_path, ttl_seconds=None, max_bytes=0, is_ours_alone=is_ours_alone)
        await store.prepare()
        new = await store.put(b"new", "png")
        store.close()
        assert (tmp_path / new.name).stat().st_mode & 0o077 == (0 if is_ours_alone else 0o044)

    before = os.umask(0o022)
    try:
        asyncio.run(main())
    finally:
        os.umask(before)
    assert left.exists() is not is_ours_alone
    assert other.exists()
    assert whole.exists()


def test_without_limits_nothing_is_swept(tmp_path):
    old = aged(tmp_path / f"{NAME}.png", 10_000_000)

    async def check(store):
        assert await store.sweep() == 0
        assert (await store.find(old.name)).modified_at == NOW - 10_000_000

    run(tmp_path, check)


def test_pictures_of_an_earlier_run_are_served_and_swept_by_the_files_own_age(tmp_path):
    young = aged(tmp_path / ("img-" + "a" * 32 + ".jpg"), 50, b"young")
    old = aged(tmp_path / ("img-" + "b" * 32 + ".jpg"), 100, b"old")

    async def check(store):
        assert (await store.find(young.name)).media_type == "image/jpeg"
        assert await store.find(old.name) is None
        assert await store.sweep() == 1
        assert [file.name for file in tmp_path.iterdir()] == [young.name]

    run(tmp_path, check, ttl_seconds=100)


def test_the_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    async def check(store):
        stored = await store.put(b"x", "png")
        assert store.path_of(stored.name) == str(tmp_path / "pictures" / stored.name)
        assert (tmp_path / "pictures" / stored.name).read_bytes() == b"x"

    run(Path("pictures"), check)


def test_a_closed_store_says_so(tmp_path):
    async def main():
        store = LocalDiskStore(tmp_path, ttl_seconds=None, max_bytes=0)
        store.close()
        with pytest.raises(StorageFailed, match="closed"):
            await store.put(b"x", "png")

    asyncio.run(main())


def test_a_reader_cancelled_while_the_file_is_opened_leaves_no_descriptor(tmp_path, monkeypatch):
    async def check(store):
        stored = await store.put(b"x", "png")
        loop = asyncio.get_running_loop()
        opening, go_on = asyncio.Event(), asyncio.Event()
        opened: list[int] = []
        closed: list[int] = []

        def slow_open(*args):
            loop.call_soon_threadsafe(opening.set)
            asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
            opened.append(os.open(*args))
            return opened[0]

        def noted_close(file):
            closed.append(file)
            os.close(file)

        monkeypatch.setattr(local_disk, "os", replaced_os(open=slow_open, close=noted_close))
        reading = asyncio.ensure_future(anext(store.read(stored.name, 0, 1)))
        await opening.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        go_on.set()
        await asyncio.to_thread(store.close)
        assert closed == opened != []

    run(tmp_path, check)


def test_a_store_in_memory_has_to_be_bounded_and_refuses_what_never_fits():
    with pytest.raises(ValueError, match="bounded"):
        MemoryStore(max_bytes=0)
    store = MemoryStore(max_bytes=10)
    with pytest.raises(StorageFailed, match="11 bytes"):
        asyncio.run(store.put(bytes(11), "png"))
    assert store.snapshot().failures == 1
