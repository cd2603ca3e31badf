"""What every job store promises: one suite, run on each of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from msgspec import structs

from img_serving.domain.images import ImageRequest, InputImage
from img_serving.domain.jobs import JobStatus
from img_serving.domain.stored import StoredError, StoredJob, StoredPicture, StoredResult
from img_serving.ports import JobQuery
from img_serving.state.memory import MemoryState
from img_serving.state.sqlite import SqliteState

State = MemoryState | SqliteState
NOW = 1_800_000_000.0


class Clock:
    now = NOW

    def __call__(self) -> float:
        return self.now


Check = Callable[[State, Clock], Awaitable[None]]


@pytest.fixture(params=["memory", "sqlite"])
def run(request, tmp_path):
    """Runs a check on a fresh store, in a loop of its own."""

    def start(check: Check) -> None:
        async def main() -> None:
            clock = Clock()
            state: State = (
                MemoryState(clock=clock)
                if request.param == "memory"
                else SqliteState(tmp_path / "state.db", clock=clock)
            )
            await state.open()
            try:
                await check(state, clock)
            finally:
                await state.close()

        asyncio.run(main())

    return start


def job(number: int = 1, **more: Any) -> StoredJob:
    return StoredJob(
        **{
            "id": f"job_{number}",
            "tenant": "amy",
            "request": ImageRequest(
                "a fox",
                given=frozenset({"seed", "size"}),
                operation="edit",
                images=(InputImage(b"", "image/png", 8, 9, "img-0.png"),),
            ),
            "created_at": NOW,
            "deadline_at": NOW + 60,
            "response_format": "url",
            "base_url": "http://gateway.test",
            "artifact_key": bytes(range(16)),
            "fingerprint": b"\xff" * 32,
            **more,
        }
    )


def test_what_was_added_comes_back_the_same(run):
    async def check(state, clock):
        whole = job(
            status=JobStatus.SUCCEEDED,
            result=StoredResult(
                1, (StoredPicture("n.png", "image/png", 8, 9, 5, "told"),), "url", "http://x", ("size",)
            ),
            error=StoredError("no", "server_error", 502, "code", "param"),
        )
        assert await state.add_job(whole) is None
        assert await state.find_job("amy", "job_1") == whole
        assert await state.load_job("job_1") == whole

    run(check)


def test_another_tenant_sees_nothing(run):
    async def check(state, clock):
        await state.add_job(job(idempotency_key="k", request_id="r"))
        assert await state.find_job("bob", "job_1") is None
        assert await state.find_key("bob", "k") is None
        assert await state.list_jobs("bob", JobQuery()) == []

    run(check)


def test_a_key_is_taken_once_and_by_each_tenant(run):
    async def check(state, clock):
        first = job(1, idempotency_key="k")
        assert await state.add_job(first) is None
        assert await state.add_job(job(2, idempotency_key="k")) == first
        assert await state.load_job("job_2") is None
        assert await state.add_job(job(3, idempotency_key="k", tenant="bob")) is None
        assert await state.find_key("amy", "k") == first

    run(check)


def test_of_many_at_once_exactly_one_gets_the_key(run):
    async def check(state, clock):
        found = await asyncio.gather(*[state.add_job(job(number, idempotency_key="k")) for number in range(50)])
        assert found.count(None) == 1
        holders = {one.id for one in found if one is not None}
        assert len(holders) == 1
        assert len(await state.list_jobs("amy", JobQuery(limit=100))) == 1

    run(check)


def test_a_key_is_free_again_when_its_job_has_expired(run):
    async def check(state, clock):
        await state.add_job(job(1, idempotency_key="k", expires_at=NOW + 10))
        clock.now = NOW + 9
        assert await state.add_job(job(2, idempotency_key="k")) is not None
        clock.now = NOW + 10
        assert await state.find_key("amy", "k") is None
        assert await state.add_job(job(2, idempotency_key="k")) is None
        assert await state.forget_expired(clock.now) == 1
        found = await state.find_key("amy", "k")
        assert found is not None
        assert found.id == "job_2"

    run(check)


def test_saving_replaces_and_does_not_bring_back(run):
    async def check(state, clock):
        await state.add_job(job())
        running = structs.replace(job(), status=JobStatus.RUNNING, at_risk=1, expires_at=NOW + 1)
        await state.save_job(running)
        assert await state.load_job("job_1") == running
        assert await state.forget_expired(NOW + 1) == 1
        await state.save_job(running)
        assert await state.load_job("job_1") is None
        assert await state.forget_expired(NOW + 1) == 0

    run(check)


def test_the_list_is_newest_first_filtered_and_paged(run):
    async def check(state, clock):
        for number in range(1, 6):
            await state.add_job(
                job(
                    number,
                    status=JobStatus.FAILED if number == 2 else JobStatus.QUEUED,
                    request_id=f"r{number}",
                    idempotency_key=f"k{number}" if number == 4 else None,
                )
            )

        async def ids(**query: Any) -> list[str]:
            return [one.id for one in await state.list_jobs("amy", JobQuery(**query))]

        assert await ids() == ["job_5", "job_4", "job_3", "job_2", "job_1"]
        assert await ids(limit=2) == ["job_5", "job_4"]
        assert await ids(limit=2, after="job_4") == ["job_3", "job_2"]
        assert await ids(after="job_1") == []
        assert await ids(after="nobody's") == []
        assert await ids(status=JobStatus.FAILED) == ["job_2"]
        assert await ids(request_id="r3") == ["job_3"]
        assert await ids(idempotency_key="k4") == ["job_4"]
        assert await ids(operation="generation") == []
        # the store is not told of every start
        for status in (JobStatus.QUEUED, JobStatus.RUNNING):
            assert len(await ids(operation="edit", status=status)) == 4

    run(check)


def test_the_unfinished_come_oldest_first(run):
    async def check(state, clock):
        for number, status in enumerate(JobStatus):
            await state.add_job(job(number, status=status))
        await state.add_job(job(9, tenant="bob"))

        async def ids(*asked: Any) -> list[str]:
            return [one.id for one in await state.unfinished_jobs(*asked)]

        assert await ids(10) == ["job_0", "job_1", "job_9"]
        assert await ids(2) == ["job_0", "job_1"]
        assert await ids(2, "job_1") == ["job_9"]
        assert await ids(2, "job_9") == []

    run(check)


def test_what_is_past_its_time_is_not_found_and_then_forgotten(run):
    async def check(state, clock):
        await state.add_job(job(1, expires_at=NOW + 5))
        await state.add_job(job(2, expires_at=NOW + 50))
        await state.add_job(job(3))
        clock.now = NOW + 6
        assert await state.find_job("amy", "job_1") is None
        assert [one.id for one in await state.list_jobs("amy", JobQuery())] == ["job_3", "job_2"]
        assert await state.forget_expired(clock.now) == 1
        assert await state.load_job("job_1") is None
        assert await state.load_job("job_2") is not None

    run(check)


def test_hostile_text_is_kept_as_it_is(run):
    async def check(state, clock):
        nasty = "'; DROP TABLE jobs; --\N{SNOWMAN}\0"
        await state.add_job(job(1, tenant=nasty, request_id=nasty, idempotency_key=nasty))
        assert (await state.find_key(nasty, nasty)).id == "job_1"
        assert len(await state.list_jobs(nasty, JobQuery(request_id=nasty))) == 1

    run(check)
