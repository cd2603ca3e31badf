"""What every state store promises: one suite, run on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import SqliteState, StateError

State = MemoryState | SqliteState
Check = Callable[[State], Awaitable[None]]


@pytest.fixture(params=["memory", "sqlite"])
def run(request, tmp_path):
    """Runs a check on a fresh store, in a loop of its own."""

    def start(check: Check) -> None:
        async def main() -> None:
            state: State = MemoryState() if request.param == "memory" else SqliteState(tmp_path / "state.db")
            await state.open()
            try:
                await check(state)
            finally:
                await state.close()

        asyncio.run(main())

    return start


def test_nothing_is_there_at_first(run):
    async def check(state):
        assert await state.backends() == []
        assert await state.get_value("key") is None

    run(check)


def test_backends_come_back_oldest_first_and_byte_for_byte(run):
    async def check(state):
        records = {"zoe": b'{"name": "zoe"}', "amy": bytes(range(256)), "mia": b""}
        for name, record in records.items():
            await state.put_backend(name, record)
        assert await state.backends() == list(records.values())

    run(check)


def test_a_replaced_backend_keeps_its_place(run):
    async def check(state):
        for name in ("one", "two"):
            await state.put_backend(name, name.encode())
        await state.put_backend("one", b"new")
        assert await state.backends() == [b"new", b"two"]

    run(check)


def test_a_backend_deleted_and_added_again_is_the_newest(run):
    async def check(state):
        for name in ("one", "two"):
            await state.put_backend(name, name.encode())
        await state.delete_backend("one")
        await state.put_backend("one", b"one")
        assert await state.backends() == [b"two", b"one"]

    run(check)


def test_deleting_what_is_not_there_is_fine(run):
    async def check(state):
        await state.delete_backend("nobody")

    run(check)


@pytest.mark.parametrize("text", ["", "plain", "그림 🎨", "it's; DROP TABLE backends --", "a\nb\0c"])
def test_names_and_values_are_any_text(run, text):
    async def check(state):
        await state.put_value(text, text)
        await state.put_backend(text, b"x")
        assert await state.get_value(text) == text
        await state.delete_backend(text)
        assert await state.backends() == []

    run(check)


def test_a_value_is_replaced(run):
    async def check(state):
        await state.put_value("key", "old")
        await state.put_value("key", "new")
        assert await state.get_value("key") == "new"

    run(check)


def test_calls_at_once_are_all_kept(run):
    async def check(state):
        await asyncio.gather(*(state.put_value(f"key {index}", str(index)) for index in range(50)))
        assert [await state.get_value(f"key {index}") for index in range(50)] == [str(index) for index in range(50)]

    run(check)


def test_closing_twice_is_fine_and_a_call_afterwards_says_why_it_fails(run):
    async def check(state):
        await state.close()
        await state.close()
        with pytest.raises(StateError, match="closed"):
            await state.get_value("key")

    run(check)
