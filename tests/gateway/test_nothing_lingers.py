"""What a job held is free as soon as it is over, however it ended: the collector comes by rarely, and pictures are big."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Iterator
from typing import Any

import pytest
from tests.support.gateways import Harness, running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.domain.jobs import Task
from img_serving.gateway.live import LiveJob

SDK = {"x-stainless-retry-count": "0"}
PATH = "/v1/images/generations"
BODY = {"prompt": "x", "size": "64x64", "n": 4}


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def lingering() -> tuple[int, int]:
    """How many jobs can still be followed, and how many tasks still have their picture."""
    everything = gc.get_objects()
    return (
        sum(isinstance(one, LiveJob) for one in everything),
        sum(isinstance(one, Task) and one.artifact is not None for one in everything),
    )


async def ask(gateway: Harness, how: str, leaves: bool) -> None:
    body: dict[str, Any] = dict(BODY)
    headers: dict[str, str] = {}
    gone = asyncio.Event()
    if leaves:
        asyncio.get_running_loop().call_later(1.2, gone.set)
        headers |= SDK
    if how == "stream":
        body |= {"stream": True, "partial_images": 3}
    elif how == "key":
        headers["idempotency-key"] = "k"
    elif how == "job":
        made = (await gateway.client.post("/v1/jobs", {"operation": "generation", "body": body})).json()
        await gateway.client.get(f"/v1/jobs/{made['id']}/events", leave=gone)
        return
    await gateway.client.post(PATH, body, headers=headers, leave=gone)


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("last", ["ok", "fail"])
@pytest.mark.parametrize("how", ["plain", "stream", "key", "job"])
def test_a_job_that_is_over_holds_no_pictures(how: str, last: str, leaves: bool) -> None:
    async def main() -> tuple[int, int]:
        script = {"latency_seconds": 2, "steps": 8, "previews": True, "sequence": ["ok", "ok", "ok", last]}
        toml = scripted("one", max_batch_size=1, **script) + "[retry]\nmax_attempts = 1\n"
        async with running(toml) as gateway:
            await ask(gateway, how, leaves)
            await asyncio.sleep(30)
            assert gateway.adapter("one").count == 4
            return lingering()

    assert run_virtual(main()) == (0, 0)
