"""No task without an owner: none vanishes, no exception is lost, all end at stop."""

from __future__ import annotations

import asyncio
import gc

import pytest

from img_serving.gateway.tasks import TaskRegistry


class Errors(list[tuple[str, BaseException]]):
    def __call__(self, name: str, error: BaseException) -> None:
        self.append((name, error))


async def emptied(registry: TaskRegistry) -> None:
    for _ in range(100):
        if not registry:
            return
        await asyncio.sleep(0)
    pytest.fail(f"still there: {registry!r}")


async def forever() -> None:
    await asyncio.Event().wait()


def test_a_task_is_held_until_it_is_done_and_then_forgotten():
    async def main():
        registry = TaskRegistry(Errors())
        go_on = asyncio.Event()
        task = registry.spawn(go_on.wait(), "waiting")
        assert (len(registry), registry.names()) == (1, ("waiting",))
        go_on.set()
        assert await task is True
        assert (len(registry), registry.names()) == (0, ())

    asyncio.run(main())


def test_a_task_that_nobody_else_refers_to_is_not_collected():
    async def main():
        registry = TaskRegistry(Errors())
        done = []

        async def work():
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            asyncio.get_running_loop().call_soon(waiting.set_result, None)
            await waiting
            done.append(True)

        registry.spawn(work(), "lonely")
        gc.collect()
        await emptied(registry)
        assert done == [True]

    asyncio.run(main())


def test_an_unexpected_exception_is_reported_with_the_tasks_name():
    async def main():
        errors = Errors()
        registry = TaskRegistry(errors)

        async def breaks():
            raise RuntimeError("oh no")

        registry.spawn(breaks(), "prober")
        await emptied(registry)
        assert [(name, str(error)) for name, error in errors] == [("prober", "oh no")]

    asyncio.run(main())


def test_a_cancelled_task_is_no_error():
    async def main():
        errors = Errors()
        registry = TaskRegistry(errors)
        registry.spawn(forever(), "waiting").cancel()
        assert await registry.cancel_all(1) == ()
        assert errors == []

    asyncio.run(main())


def test_cancelling_all_waits_until_they_have_cleaned_up():
    async def main():
        registry = TaskRegistry(Errors())
        cleaned = []

        async def work(name):
            try:
                await forever()
            finally:
                await asyncio.sleep(0)
                cleaned.append(name)

        for name in "abc":
            registry.spawn(work(name), name)
        await asyncio.sleep(0)
        assert await registry.cancel_all(5) == ()
        assert sorted(cleaned) == ["a", "b", "c"]
        assert len(registry) == 0

    asyncio.run(main())


def test_a_task_that_does_not_end_in_time_is_named():
    async def main():
        registry = TaskRegistry(Errors())
        let_go = asyncio.Event()

        async def stubborn():
            while not let_go.is_set():
                try:
                    await let_go.wait()
                except asyncio.CancelledError:
                    continue

        task = registry.spawn(stubborn(), "stubborn")
        registry.spawn(forever(), "willing")
        await asyncio.sleep(0)
        assert await registry.cancel_all(0.01) == ("stubborn",)
        let_go.set()
        await task

    asyncio.run(main())


def test_each_is_cancelled_once_so_that_its_cleaning_up_is_not_interrupted():
    async def main():
        errors = Errors()
        registry = TaskRegistry(errors)
        cancelled = []

        async def work():
            try:
                await forever()
            except asyncio.CancelledError:
                for _ in range(5):
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        cancelled.append("again")
                raise

        registry.spawn(work(), "slow")
        for _ in range(5):
            registry.spawn(forever(), "quick")
        await asyncio.sleep(0)
        assert await registry.cancel_all(5) == ()
        assert cancelled == []

    asyncio.run(main())


def test_what_a_task_starts_on_its_way_out_is_ended_too():
    async def main():
        registry = TaskRegistry(Errors())

        async def work():
            try:
                await forever()
            finally:
                registry.spawn(forever(), "child")

        registry.spawn(work(), "parent")
        await asyncio.sleep(0)
        assert await registry.cancel_all(5) == ()
        assert len(registry) == 0

    asyncio.run(main())


def test_a_task_of_the_registry_may_end_the_others_and_is_spared():
    async def main():
        registry = TaskRegistry(Errors())
        registry.spawn(forever(), "other")

        async def stop():
            return await registry.cancel_all(5), registry.names()

        assert await registry.spawn(stop(), "stopper") == ((), ("stopper",))

    asyncio.run(main())


def test_an_error_while_stopping_is_reported_too():
    async def main():
        errors = Errors()
        registry = TaskRegistry(errors)

        async def work():
            try:
                await forever()
            finally:
                raise RuntimeError("while cleaning up")

        registry.spawn(work(), "broken")
        await asyncio.sleep(0)
        assert await registry.cancel_all(5) == ()
        assert [name for name, _ in errors] == ["broken"]

    asyncio.run(main())


def test_without_a_running_loop_the_coroutine_is_closed_and_nothing_leaks():
    registry = TaskRegistry(Errors())
    with pytest.raises(RuntimeError):
        registry.spawn(forever(), "nowhere")
    assert len(registry) == 0
