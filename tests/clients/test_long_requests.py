"""Pictures that take long: what keeps a connection open disturbs no library, and what fails in the end is seen to fail."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.clients.conftest import Clients
from tests.clients.rehearsal import KEY, PICTURE, backend, environment
from tests.support.event_streams import post
from tests.support.official_clients import OfficialClient, Told, need_clients
from tests.support.programs import Program, serving

need_clients()
pytestmark = pytest.mark.smoke

SILENT_SECONDS = 22
"""Longer than a stream is silent: its head waits for five seconds, and the first heartbeat follows after fifteen."""


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Its replies are kept open early on."""
    config = "[server]\nkeepalive_after_seconds = 0.2\n" + "".join((
        backend("slow", latency_seconds=1),
        backend("slow-to-fail", latency_seconds=1, sequence=["fail"]),
        backend("silent", latency_seconds=SILENT_SECONDS),
    ))  # fmt: skip
    with serving(tmp_path_factory.mktemp("patient"), config, environment=environment()) as program:
        yield program


def draw(client: OfficialClient, program: Program, model: str, **more: Any) -> Told:
    given = {"prompt": "x", "model": model, **PICTURE, **more}
    return client.call("generate", f"{program.url}/v1", KEY, **given)


def test_blanks_before_the_reply_disturb_nobody(client: OfficialClient, patient: Program) -> None:
    told = draw(client, patient, "slow")
    assert len(told.pictures) == 1
    assert told.result["created"] > 1_700_000_000
    assert "content-length" not in told.attempts[0].headers


def test_a_failure_after_the_reply_began_is_no_result(client: OfficialClient, patient: Program) -> None:
    """The connection is cut. Python's library asks again by itself, and is told what became of the job; Node's raises."""
    told = draw(client, patient, "slow-to-fail")
    if client.language == "python":
        assert told.statuses == [200, 502]
        assert "InternalServerError" in told.error.classes
        assert told.attempts[1].headers["x-should-retry"] == "false"
        assert told.attempts[1].sent["x-stainless-retry-count"] == "1"
    else:
        assert told.statuses == [200]
        assert told.error.message.endswith(("Premature close", "terminated"))


@pytest.fixture(scope="module")
def heartbeats(clients: Clients, patient: Program) -> dict[str, Told]:
    """What all of them make of a stream on which nothing happens for long, but that there are heartbeats."""
    body = {"prompt": "x", "model": "silent", "size": "64x64", "stream": True}
    with ThreadPoolExecutor(1) as pool:
        raw = pool.submit(post, patient.url, "/v1/images/generations", KEY, body)
        told = clients.at_once(lambda one: draw(one, patient, "silent", stream=True, partial_images=2))
        assert raw.result().comments
    return told


def test_heartbeats_disturb_no_stream(client: OfficialClient, heartbeats: dict[str, Told]) -> None:
    told = heartbeats[client.name]
    assert told.raised is None
    assert [event["type"] for event in told.events] == ["image_generation.completed"]
    assert told.seconds >= SILENT_SECONDS
