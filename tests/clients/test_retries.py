"""The libraries' own retries succeed where they can, and are not made where they would be for nothing."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from typing import Any
from urllib.error import HTTPError

import pytest
from tests.clients.conftest import Clients
from tests.clients.rehearsal import KEY, PICTURE, backend, environment, limited_key
from tests.support.official_clients import OfficialClient, Told, need_clients
from tests.support.programs import Program, serving

need_clients()
pytestmark = pytest.mark.smoke


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One picture is drawn at a time, one may wait."""
    config = "[queue]\nmax_tasks = 1\n" + backend("slow", latency_seconds=1, max_concurrency=1, max_batch_size=1)
    with serving(tmp_path_factory.mktemp("crowded"), config, environment=environment()) as program:
        yield program


def draw(client: OfficialClient, program: Program, model: str, key: str = KEY, **more: Any) -> Told:
    given = {"prompt": "x", "model": model, **PICTURE, **more}
    return client.call("generate", f"{program.url}/v1", key, **given)


def waits(told: Told) -> list[tuple[float, float]]:
    """Of each refusal: the seconds that it asked for, and those that the library waited before it tried again."""
    # timers may fire a little early: Node's do
    return [
        (float(first.headers["retry-after-ms"]) / 1000, second.seconds - first.seconds + 0.01)
        for first, second in pairwise(told.attempts)
    ]


def test_over_a_limit_the_library_waits_as_long_as_it_is_told(client: OfficialClient, rehearsal: Program) -> None:
    key = limited_key(client.name)
    for _ in range(20):
        told = draw(client, rehearsal, "blind", key)
        assert told.pictures
        if len(told.attempts) > 1:
            break
    assert (told.statuses[0], told.statuses[-1]) == (429, 200)
    assert [one.sent["x-stainless-retry-count"] for one in told.attempts[:2]] == ["0", "1"]
    for asked, waited in waits(told):
        assert 0 < asked <= 1
        assert waited >= asked


def test_a_full_queue_is_tried_again_when_there_is_room(client: OfficialClient, crowded: Program) -> None:
    for _ in range(5):
        fill(crowded)
        told = draw(client, crowded, "slow", options={"max_retries": 5})
        assert told.pictures
        if told.statuses[0] == 503:
            break  # else there was room again before the client came, as happens on a busy machine
    assert (told.statuses[0], told.statuses[-1]) == (503, 200)
    for attempt in told.attempts[:-1]:
        assert 1 <= int(attempt.headers["retry-after"]) <= 59
    for asked, waited in waits(told):
        assert waited >= asked


def test_what_would_fail_again_is_not_tried_again(client: OfficialClient, rehearsal: Program) -> None:
    told = draw(client, rehearsal, "fails")
    assert told.statuses == [502]
    assert told.attempts[0].headers["x-should-retry"] == "false"
    assert "InternalServerError" in told.error.classes


@pytest.fixture(scope="module")
def joined(clients: Clients, once: Program) -> dict[str, Told]:
    """What all of them get that give up their first attempt half-way, and try again by themselves."""
    return clients.at_once(lambda one: draw(one, once, f"retry-{one.name}", options={"timeout": 1.5}))


def test_a_retry_after_the_clients_own_time_out_joins_the_running_job(
    client: OfficialClient, joined: dict[str, Told]
) -> None:
    told = joined[client.name]
    assert told.pictures
    assert told.statuses == [200]
    assert told.attempts[0].sent["x-stainless-retry-count"] != "0"


def fill(program: Program) -> None:
    """Ask for two pictures, and return when one of them is drawn and the other one waits (or that was missed)."""

    def ask() -> None:
        body = json.dumps({"prompt": "y", "model": "slow", **PICTURE}).encode()
        with suppress(HTTPError):
            _fetch(program, "/v1/images/generations", body)

    _wait_for(program, 0, 0)
    for waiting in (0, 1):
        threading.Thread(target=ask, daemon=True).start()
        _wait_for(program, 1, waiting)


def _wait_for(program: Program, running: int, waiting: int) -> None:
    until = time.monotonic() + 5
    while _queue(program) != (running, waiting) and time.monotonic() < until:
        time.sleep(0.005)


def _queue(program: Program) -> tuple[int, int]:
    """How many pictures are drawn, and how many wait."""
    seen = json.loads(_fetch(program, "/v1/queue"))
    return int(seen["running"]), int(seen["depth"])


def _fetch(program: Program, path: str, body: bytes | None = None) -> bytes:
    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    request = urllib.request.Request(program.url + path, body, headers)  # noqa: S310 - our own
    with urllib.request.urlopen(request, timeout=30) as reply:  # noqa: S310 - the same
        content: bytes = reply.read()
    return content
