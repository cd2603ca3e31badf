"""What every artifact store promises: one suite, run on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.domain.errors import NotFound, StorageFailed
from img_serving.storage.local_disk import CHUNK_BYTES, LocalDiskStore
from img_serving.storage.memory import MemoryStore

steady = settings(deadline=None, derandomize=True)

DAY = 86400.0
FOREIGN = [
    "",
    ".",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "holiday.png",
    "img-" + "a" * 32,
    "a" * 32 + ".png",
    "img-" + "A" * 32 + ".png",
    "a" * 31 + ".png",
    "a" * 33 + ".png",
    "img-" + "a" * 32 + ".PNG",
    "img-" + "a" * 32 + ".gif",
    "img-" + "a" * 32 + ".png\n",
    "img-" + "a" * 32 + ".png\0",
    "a" * 31 + "\u0430.png",
    "img-" + "\uff11" * 32 + ".png",
    "./" + "img-" + "a" * 32 + ".png",
    "." + "img-" + "a" * 32 + ".part",
    "a" * 5000,
]


class Clock:
    def __init__(self) -> None:
        self.now = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


Store = LocalDiskStore | MemoryStore
Check = Callable[[Store, Clock], Awaitable[None]]


@pytest.fixture(params=["local_disk", "memory"])
def run(request, tmp_path: Path):
    """Runs a check on a fresh store that keeps pictures for a day, in a loop of its own."""

    def start(check: Check) -> None:
        clock = Clock()
        if request.param == "memory":
            store: Store = MemoryStore(ttl_seconds=DAY, max_bytes=8 << 20, clock=clock)
        else:
            store = LocalDiskStore(tmp_path / "pictures", ttl_seconds=DAY, max_bytes=8 << 20, clock=clock)

        async def main() -> None:
            await store.prepare()
            try:
                await check(store, clock)
            finally:
                store.close()

        asyncio.run(main())

    return start


async def everything(store: Store, name: str, start: int, stop: int) -> list[bytes]:
    return [chunk async for chunk in store.read(name, start, stop)]


@pytest.mark.parametrize(
    ("extension", "media_type"), [("png", "image/png"), ("jpg", "image/jpeg"), ("webp", "image/webp")]
)
def test_a_stored_picture_is_found_with_its_record(run, extension, media_type):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(b"pixels", extension)
        assert stored.name.endswith("." + extension)
        assert (stored.media_type, stored.size_bytes, stored.modified_at) == (media_type, 6, clock.now)
        assert await store.find(stored.name) == stored

    run(check)


def test_a_picture_is_read_back_byte_for_byte_in_chunks_of_at_most_a_mebibyte(run):
    async def check(store: Store, clock: Clock) -> None:
        data = bytes(range(256)) * (CHUNK_BYTES // 256) * 2 + b"the end"
        stored = await store.put(data, "png")
        chunks = await everything(store, stored.name, 0, stored.size_bytes)
        assert b"".join(chunks) == data
        assert [len(chunk) for chunk in chunks] == [CHUNK_BYTES, CHUNK_BYTES, 7]

    run(check)


def test_a_range_is_half_open(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(b"0123456789", "png")
        assert b"".join(await everything(store, stored.name, 3, 7)) == b"3456"
        assert await everything(store, stored.name, 4, 4) == []

    run(check)


def test_a_memoryview_is_accepted_also_one_into_a_larger_buffer(run):
    async def check(store: Store, clock: Clock) -> None:
        buffer = bytearray(b"head" + b"picture" + b"tail")
        stored = await store.put(memoryview(buffer)[4:11], "webp")
        buffer[:] = bytes(len(buffer))
        assert b"".join(await everything(store, stored.name, 0, stored.size_bytes)) == b"picture"

    run(check)


def test_an_empty_picture_is_kept_as_it_is(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(b"", "png")
        assert stored.size_bytes == 0
        assert await everything(store, stored.name, 0, 0) == []

    run(check)


def test_names_cannot_be_guessed_and_never_repeat(run):
    async def check(store: Store, clock: Clock) -> None:
        names = {(await store.put(b"x", "png")).name for _ in range(20)}
        assert len(names) == 20
        assert all(len(name) == 40 for name in names)

    run(check)


@pytest.mark.parametrize("name", FOREIGN)
def test_a_name_that_no_store_gives_is_not_found(run, name):
    async def check(store: Store, clock: Clock) -> None:
        assert await store.find(name) is None
        with pytest.raises(NotFound):
            await everything(store, name, 0, 1)
        with pytest.raises(NotFound):
            store.path_of(name)

    run(check)


def test_an_unknown_picture_is_not_found(run):
    async def check(store: Store, clock: Clock) -> None:
        name = "img-" + "0" * 32 + ".png"
        assert await store.find(name) is None
        with pytest.raises(NotFound, match="gone"):
            await everything(store, name, 0, 1)

    run(check)


def test_reading_past_the_end_says_so_instead_of_ending_early(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(b"short", "png")
        with pytest.raises(StorageFailed, match="ends before byte 9"):
            await everything(store, stored.name, 0, 9)

    run(check)


def test_an_extension_that_is_no_pictures_is_refused(run):
    async def check(store: Store, clock: Clock) -> None:
        for extension in ("gif", "", "png/../x", "PNG"):
            with pytest.raises(ValueError, match="no picture has the extension"):
                await store.put(b"x", extension)

    run(check)


def test_an_expired_picture_is_not_found_also_before_it_is_swept(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(b"x", "png")
        clock.now += DAY - 1
        assert await store.find(stored.name) is not None
        clock.now += 1
        assert await store.find(stored.name) is None

    run(check)


def test_a_sweep_removes_what_is_expired_and_counts_it(run):
    async def check(store: Store, clock: Clock) -> None:
        old = await store.put(b"old", "png")
        clock.now += DAY / 2
        young = await store.put(b"young", "png")
        clock.now += DAY / 2
        assert await store.sweep() == 1
        assert await store.sweep() == 0
        assert await store.find(old.name) is None
        assert await store.find(young.name) == young
        assert store.snapshot().swept == 1

    run(check)


def test_past_the_size_limit_the_oldest_go_first(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = []
        for _ in range(10):
            stored.append(await store.put(bytes(1 << 20), "png"))
            clock.now += 1
        await store.sweep()
        assert [await store.find(one.name) is not None for one in stored] == [False] * 2 + [True] * 8

    run(check)


def test_a_reader_that_leaves_early_leaves_nothing_open(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(bytes(3 * CHUNK_BYTES), "png")
        reader = store.read(stored.name, 0, stored.size_bytes)
        assert len(await anext(reader)) == CHUNK_BYTES
        await reader.aclose()  # type: ignore[attr-defined]

    run(check)


def test_a_picture_swept_while_it_is_read_is_still_read_to_its_end(run):
    async def check(store: Store, clock: Clock) -> None:
        stored = await store.put(bytes(2 * CHUNK_BYTES), "png")
        reader = store.read(stored.name, 0, stored.size_bytes)
        await anext(reader)
        clock.now += DAY
        assert await store.sweep() == 1
        assert len(await anext(reader)) == CHUNK_BYTES
        with pytest.raises(StopAsyncIteration):
            await anext(reader)

    run(check)


def test_many_pictures_at_once_are_all_stored(run):
    async def check(store: Store, clock: Clock) -> None:
        data = [bytes([index]) * 1000 for index in range(40)]
        stored = await asyncio.gather(*(store.put(one, "png") for one in data))
        for one, expected in zip(stored, data, strict=True):
            assert b"".join(await everything(store, one.name, 0, 1000)) == expected
        assert (store.snapshot().stored, store.snapshot().bytes, store.snapshot().failures) == (40, 40_000, 0)

    run(check)


@steady
@given(name=st.text(max_size=50))
def test_no_text_at_all_finds_a_picture_that_was_not_stored(name):
    assert asyncio.run(MemoryStore().find(name)) is None


def test_a_picture_may_be_stored_again_under_its_name(run):
    async def check(store, clock):
        first = await store.put(b"one", "png")
        again = await store.put(b"another", "png", first.name)
        assert again.name == first.name
        assert await store.names() == [first.name]
        found = await store.find(first.name)
        assert found.size_bytes == 7
        assert b"".join([chunk async for chunk in store.read(first.name, 0, 7)]) == b"another"

    run(check)


@pytest.mark.parametrize("name", [*FOREIGN, "img-" + "b" * 32 + ".jpg"])
def test_a_name_that_no_store_gives_for_that_type_is_not_stored_under(run, name):
    async def check(store, clock):
        with pytest.raises(ValueError, match="no name of a picture"):
            await store.put(b"one", "png", name)

    if name != "img-" + "a" * 32 + ".png":
        run(check)


def test_a_deleted_picture_is_gone(run):
    async def check(store, clock):
        stored = await store.put(b"one", "png")
        kept = await store.put(b"two", "jpg")
        assert await store.delete(stored.name)
        assert not await store.delete(stored.name)
        assert await store.find(stored.name) is None
        assert await store.names() == [kept.name]

    run(check)


@pytest.mark.parametrize("name", FOREIGN)
def test_deleting_a_foreign_name_does_nothing(run, name):
    async def check(store, clock):
        assert not await store.delete(name)

    run(check)
