"""`Idempotency-Key`, which the libraries send where their user says so: one picture, however often it is asked for."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from tests.clients.conftest import Clients
from tests.clients.rehearsal import KEY
from tests.support.official_clients import OfficialClient, Told, need_clients, picture_file
from tests.support.programs import Program

from img_serving.backends.scripted import picture

need_clients()
pytestmark = pytest.mark.smoke


def draw(client: OfficialClient, program: Program, key: str, **more: Any) -> Told:
    given = {"prompt": "x", "model": "procedural", "size": "64x64", "response_format": "url", **more}
    scenario = "edit" if "image" in more else "generate"
    return client.call(scenario, f"{program.url}/v1", KEY, headers={"Idempotency-Key": key}, **given)


@pytest.mark.parametrize("more", [{}, {"image": picture_file(picture("a boat", 1, 64, 64))}, {"n": 2}])
def test_the_same_key_and_body_give_the_same_result(client: OfficialClient, gateway: Program, more: Any) -> None:
    key = f"order-{uuid4()}"
    first, again = (draw(client, gateway, key, **more) for _ in range(2))
    assert first.pictures == again.pictures
    assert first.result == again.result
    assert first.attempts[0].sent["idempotency-key"] == key
    assert "idempotent-replayed" not in first.attempts[0].headers
    assert again.attempts[0].headers["idempotent-replayed"] == "true"


def test_without_the_key_it_is_drawn_again(client: OfficialClient, gateway: Program) -> None:
    first, again = (draw(client, gateway, f"order-{uuid4()}") for _ in range(2))
    assert first.pictures != again.pictures


def test_the_same_key_with_another_body_is_a_conflict(client: OfficialClient, gateway: Program) -> None:
    key = f"order-{uuid4()}"
    assert draw(client, gateway, key).pictures
    told = draw(client, gateway, key, prompt="y")
    assert "ConflictError" in told.error.classes
    assert told.error.type == "invalid_request_error"
    assert told.statuses == [409]
    assert told.attempts[0].headers["x-should-retry"] == "false"


@pytest.fixture(scope="module")
def retried(clients: Clients, once: Program) -> dict[str, Told]:
    """What all of them get that give up their first attempt half-way, and try again by themselves."""
    return clients.at_once(
        lambda one: draw(one, once, f"order-{one.name}", model=f"order-{one.name}", options={"timeout": 1.5})
    )


def test_the_librarys_own_retry_finds_the_same_job(client: OfficialClient, retried: dict[str, Told]) -> None:
    told = retried[client.name]
    assert told.pictures
    assert told.statuses == [200]
    assert told.attempts[0].sent["x-stainless-retry-count"] != "0"
    assert told.attempts[0].sent["idempotency-key"] == f"order-{client.name}"
