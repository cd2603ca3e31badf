"""One record that cannot be read costs its job, and neither the start nor the others."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from tests.support.gateways import Harness, running, scripted

from img_serving.state.sqlite import SqliteState

SLOW = scripted("one", latency_seconds=60, max_batch_size=1)


def damage(path: Path, job_id: str) -> None:
    with closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE jobs SET record = x'00' WHERE id = ?", (job_id,))


async def make(gateway: Harness, key: str) -> str:
    body = {"operation": "generation", "body": {"prompt": key, "size": "64x64"}}
    reply = await gateway.client.post("/v1/jobs", body, headers={"idempotency-key": key})
    assert reply.status == 202
    return str(reply.json()["id"])


def test_the_gateway_starts_and_the_other_jobs_go_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "state.db"

    async def main() -> None:
        async with running(SLOW, state=SqliteState(path)) as gateway:
            made = [await make(gateway, str(number)) for number in range(3)]
            await gateway.gateway.state.close()
        damage(path, made[1])
        async with running(SLOW, state=SqliteState(path)) as gateway:
            assert [one for one in made if gateway.gateway.services.jobs.live(one)] == [made[0], made[2]]
            listed = (await gateway.client.get("/v1/jobs")).json()["data"]
            assert [one["id"] for one in listed] == [made[2], made[0]]
            assert (await gateway.client.get(f"/v1/jobs/{made[1]}")).status == 404
            assert await make(gateway, "1") != made[1]
            await gateway.gateway.state.close()
        assert made[1] in caplog.text

    asyncio.run(main())
