"""What the libraries make of our streams: previews, pictures, errors in the middle, and connections that are cut."""

from __future__ import annotations

import base64
import signal
from typing import Any

import pytest
from tests.clients.conftest import Clients
from tests.clients.rehearsal import KEY, backend, environment
from tests.support.official_clients import OfficialClient, Told, need_clients, picture_file
from tests.support.programs import Program, serving

from img_serving.backends.scripted import picture

need_clients()
pytestmark = pytest.mark.smoke

CUT = {
    "python-1": ("RemoteProtocolError", "peer closed connection"),
    "python-2": ("RemoteProtocolError", "peer closed connection"),
    "python-3": ("APIConnectionError", "Connection error"),
    "node-4": ("Error", "Premature close"),
    "node-6": ("TypeError", "terminated"),
    "node-7": ("TypeError", "terminated"),
}
"""What a library raises when a stream is cut: its own error, or the transport's; class and words."""


def stream(client: OfficialClient, program: Program, model: str = "procedural", **more: Any) -> Told:
    """Of a picture, or of an edit where there is an `image`."""
    given = {"prompt": "x", "model": model, "size": "64x64", "stream": True, **more}
    return client.call("edit" if "image" in more else "generate", f"{program.url}/v1", KEY, **given)


def kinds(told: Told) -> list[str]:
    assert told.raised is None, told.raised
    return [str(one["type"]) for one in told.events]


def assert_pictures(told: Told) -> None:
    for one in told.events:
        assert base64.b64decode(one["b64_json"]).startswith((b"\x89PNG", b"\xff\xd8"))


BOAT = picture_file(picture("a boat", 1, 64, 64), "boat.png")


@pytest.mark.parametrize("previews", [0, 2])
def test_a_generation_is_streamed(client: OfficialClient, gateway: Program, previews: int) -> None:
    told = stream(client, gateway, partial_images=previews)
    assert kinds(told) == ["image_generation.partial_image"] * previews + ["image_generation.completed"]
    assert [one["partial_image_index"] for one in told.events[:-1]] == list(range(previews))
    assert_pictures(told)
    assert told.events[-1]["size"] == "64x64"
    assert told.events[-1]["usage"]["total_tokens"] >= 0


@pytest.mark.parametrize("previews", [0, 2])
def test_an_edit_is_streamed(client: OfficialClient, gateway: Program, previews: int) -> None:
    told = stream(client, gateway, partial_images=previews, image=BOAT)
    assert kinds(told) == ["image_edit.partial_image"] * previews + ["image_edit.completed"]
    assert_pictures(told)


def test_an_edit_of_a_list_is_streamed(client: OfficialClient, gateway: Program) -> None:
    assert kinds(stream(client, gateway, image=[BOAT])) == ["image_edit.completed"]


@pytest.mark.parametrize("more", [{}, {"image": BOAT}])
def test_the_asynchronous_client_streams_too(python_client: OfficialClient, gateway: Program, more: Any) -> None:
    told = python_client.call(
        "edit" if more else "generate", f"{gateway.url}/v1", KEY, options={"asynchronous": True},
        prompt="x", model="procedural", size="64x64", stream=True, partial_images=2, **more,
    )  # fmt: skip
    assert [kind.rpartition(".")[2] for kind in kinds(told)] == ["partial_image", "partial_image", "completed"]


def test_a_stream_ends_in_the_picture_that_the_plain_call_gives(client: OfficialClient, gateway: Program) -> None:
    same: dict[str, Any] = {"prompt": "x", "model": "procedural", "size": "64x64", "extensions": {"seed": 11}}
    plain = client.call("generate", f"{gateway.url}/v1", KEY, response_format="b64_json", **same)
    told = client.call("generate", f"{gateway.url}/v1", KEY, stream=True, partial_images=1, **same)
    assert told.events[-1]["b64_json"] == plain.pictures[0]["b64_json"]


def test_several_pictures_can_be_told_apart(client: OfficialClient, gateway: Program) -> None:
    told = stream(client, gateway, n=2, partial_images=1)
    done = [one for one in told.events if one["type"] == "image_generation.completed"]
    assert sorted(one["image_index"] for one in done) == [0, 1]
    assert len({one["b64_json"] for one in done}) == 2


def test_a_backend_without_previews_streams_the_picture_alone(client: OfficialClient, rehearsal: Program) -> None:
    assert kinds(stream(client, rehearsal, "blind", partial_images=2)) == ["image_generation.completed"]


@pytest.mark.parametrize("more", [{}, {"image": BOAT}])
def test_an_error_after_a_preview_is_raised(client: OfficialClient, rehearsal: Program, more: Any) -> None:
    told = stream(client, rehearsal, "breaks", partial_images=3, **more)
    assert [str(one["type"]).rpartition(".")[2] for one in told.events] == ["partial_image"] * len(told.events)
    assert told.events
    assert "APIError" in told.error.classes
    assert told.error.code == "backend_failed"
    assert "failed half-way" in told.error.message
    assert len(told.attempts) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [("none", "NotFoundError"), ("refuses", "BadRequestError"), ("fails", "InternalServerError")],
)
def test_what_fails_early_is_raised_by_its_status(
    client: OfficialClient, rehearsal: Program, model: str, name: str
) -> None:
    told = stream(client, rehearsal, model, partial_images=2)
    assert name in told.error.classes
    assert told.events == []
    assert told.error.request_id == told.attempts[0].headers["x-request-id"]


@pytest.fixture(scope="module")
def cut(clients: Clients, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Told]:
    """What all of them make of a server that dies when each has seen its first preview."""
    script = backend("slow", steps=4, previews=True, latency_seconds=20, max_batch_size=1)
    with serving(tmp_path_factory.mktemp("cut"), script, environment=environment()) as program:
        showing = set(clients.present)

        def draw(client: OfficialClient) -> Told:
            def seen(event: dict[str, Any]) -> None:
                showing.discard(client.name)
                if not showing:
                    program.process.send_signal(signal.SIGKILL)

            given: dict[str, Any] = {
                "prompt": "x",
                "model": "slow",
                "size": "64x64",
                "stream": True,
                "partial_images": 3,
            }
            return client.call("generate", f"{program.url}/v1", KEY, on_event=seen, **given)

        return clients.at_once(draw)


def test_a_connection_that_is_cut_is_raised(client: OfficialClient, cut: dict[str, Told]) -> None:
    told = cut[client.name]
    assert {one["type"] for one in told.events} == {"image_generation.partial_image"}
    name, words = CUT[client.name]
    assert name in told.error.classes
    assert words in told.error.message
    assert len(told.attempts) == 1
