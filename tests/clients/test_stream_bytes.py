"""Our event streams on the wire: one test for each thing that a server can do to the official clients with its bytes.

The libraries forgive some of it, and are silent or break at the rest: an event that is lost, an error that passes for a
picture, a stream that ends as if all were well. So all of it is checked on the bytes, of every kind of stream that there is.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.clients.rehearsal import KEY, OPERATIONS, backend, environment
from tests.support.event_streams import Reply, form, post
from tests.support.programs import Program, serving

from img_serving.backends.scripted import picture

pytestmark = pytest.mark.smoke

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"
IMAGE_EVENTS = {
    f"{operation}.{event}"
    for operation in ("image_generation", "image_edit")
    for event in ("partial_image", "completed")
}
ERROR_KEYS = {"message", "type", "param", "code"}


def generation(**more: Any) -> tuple[str, dict[str, Any]]:
    return GENERATIONS, {"prompt": "x", "size": "64x64", "stream": True, **more}


def edit(**more: Any) -> tuple[str, dict[str, Any]]:
    return EDITS, {"prompt": "x", "size": "64x64", "stream": True, **more}


GOOD = {
    "none asked for": generation(model="procedural"),
    "two previews": generation(model="procedural", partial_images=2),
    "three previews": generation(model="gpt-image-1", partial_images=3),
    "two pictures": generation(model="procedural", partial_images=1, n=2),
    "jpeg": generation(model="procedural", output_format="jpeg"),
    "edit": edit(model="procedural"),
    "edit with previews": edit(model="procedural", partial_images=2),
}
REHEARSED = {
    "a backend with previews": generation(model="org/steady", partial_images=2),
    "a backend without": generation(model="blind", partial_images=2),
    "breaks": generation(model="breaks", partial_images=2),
    "an edit that breaks": edit(model="breaks", partial_images=2),
    "one of two breaks": generation(model="one-breaks", partial_images=1, n=2),
}
REFUSED = {
    "no such model": (generation(model="none"), 404),
    "a size that is none": (generation(model="blind", size="9x"), 400),
    "too many previews": (generation(model="blind", partial_images=4), 400),
    "refused by the backend": (generation(model="refuses"), 400),
    "failed before there was anything": (generation(model="fails", partial_images=2), 502),
    "failed half-way with nothing to show": (generation(model="breaks"), 502),
}


def ask(program: Program, path: str, body: dict[str, Any], **more: Any) -> Reply:
    if path != EDITS:
        return post(program.url, path, KEY, body, **more)
    fields = {name: str(value).lower() for name, value in body.items()}
    sent, headers = form(fields, {"image": picture("a boat", 1, 64, 64)})
    return post(program.url, path, KEY, sent, headers=headers, **more)


@pytest.fixture(scope="session")
def streams(gateway: Program, rehearsal: Program) -> dict[str, Reply]:
    """Every kind of stream, once."""
    asked = [(gateway, one) for one in GOOD.items()] + [(rehearsal, one) for one in REHEARSED.items()]
    return {name: ask(program, *what) for program, (name, what) in asked}


@pytest.fixture(params=[*GOOD, *REHEARSED])
def stream(request: pytest.FixtureRequest, streams: dict[str, Reply]) -> Reply:
    return streams[request.param]


@pytest.fixture(params=GOOD)
def good(request: pytest.FixtureRequest, streams: dict[str, Reply]) -> Reply:
    return streams[request.param]


@pytest.fixture(params=[name for name in REHEARSED if "break" in name])
def broken(request: pytest.FixtureRequest, streams: dict[str, Reply]) -> Reply:
    return streams[request.param]


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Program]:
    """It takes two seconds, shows something at each half of them, and is impatient when it has to end."""
    config = "[server]\ndrain_timeout_seconds = 0.2\n" + backend(
        "slow", operations=OPERATIONS, steps=4, previews=True, latency_seconds=2
    )
    with serving(tmp_path / "slow", config, environment=environment()) as program:
        yield program


def test_frames_are_an_event_and_its_data_with_comments_between(stream: Reply) -> None:
    assert stream.status == 200
    for block in stream.blocks:
        kinds = [line.partition(b":")[0].decode() for line in block if not line.startswith(b":")]
        assert kinds in ([], ["event", "data"])


def test_every_event_has_its_name_outside_and_inside(stream: Reply) -> None:
    assert stream.frames
    for frame in stream.frames:
        assert frame.event == frame.data["type"]


def test_nothing_follows_the_last_event(stream: Reply) -> None:
    assert b"[DONE]" not in stream.body


def test_lines_end_as_unix_lines_do(stream: Reply) -> None:
    assert b"\r" not in stream.body


def test_a_blank_line_follows_the_last_frame(stream: Reply) -> None:
    """Python, and Node up to 6, lose an event that has none, and say nothing."""
    assert stream.is_whole
    assert stream.body.endswith(b"\n\n")
    assert not stream.body.endswith(b"\n\n\n")


def test_an_error_is_an_event_with_the_error_object_inside(broken: Reply) -> None:
    last = broken.frames[-1]
    assert last.event == "error"
    assert last.data.keys() == {"type", "error"}
    assert last.data["error"].keys() == ERROR_KEYS
    assert isinstance(last.data["error"]["message"], str)
    assert last.data["error"]["type"] == "server_error"


def test_an_error_stands_nowhere_else(stream: Reply) -> None:
    """Data with an `error` raises, whatever the event is called."""
    for frame in stream.frames[:-1]:
        assert "error" not in frame.data
    for frame in stream.frames[-1:]:
        assert ("error" in frame.data) == (frame.event == "error")


def test_an_error_is_never_flat(stream: Reply) -> None:
    """Python, and Node up to 6, take `{"type": "error", "message": …}` for a picture's event."""
    for frame in stream.frames:
        assert not {"message", "code"} & frame.data.keys()


def test_a_heartbeat_is_a_comment_and_no_event(stream: Reply) -> None:
    """An event that the library does not know is given to its user all the same."""
    assert set(stream.events) <= IMAGE_EVENTS | {"error"}


def test_no_event_is_without_data(stream: Reply) -> None:
    """Data that is no JSON kills the stream, and so does none."""
    for frame in stream.frames:
        assert len(frame.values("data")) == 1
        assert frame.data


def test_a_stream_ends_with_every_picture_or_an_error(streams: dict[str, Reply]) -> None:
    """One that ends cleanly after a preview leaves the user without a picture and without an exception."""
    for name, (_, asked) in {**GOOD, **REHEARSED}.items():
        reply = streams[name]
        assert len(reply.completed) == asked.get("n", 1) or reply.events[-1] == "error", name
        assert reply.events[-1].endswith((".completed", "error")), name
        assert reply.events.count("error") <= 1, name


def test_a_stream_that_the_server_gives_up_does_not_end_cleanly(slow: Program) -> None:
    """One that is told to end has an error for its last event, or is cut: never the end of a whole stream."""

    def stop(reply: Reply) -> None:
        if reply.frames and not told:
            told.append(None)
            slow.process.send_signal(signal.SIGTERM)

    told: list[None] = []
    reply = ask(slow, *generation(model="slow", partial_images=3), on_piece=stop)
    assert told
    assert not reply.is_whole or reply.events[-1] == "error"


def test_a_stream_is_cut_in_mid_chunk_when_the_server_dies(slow: Program) -> None:
    reply = ask(
        slow,
        *generation(model="slow", partial_images=3),
        on_piece=lambda reply: slow.process.send_signal(signal.SIGKILL),
    )
    assert not reply.is_whole
    assert not reply.completed


def test_a_stream_is_never_answered_with_plain_json(stream: Reply) -> None:
    """The libraries see no event in it, and no error either."""
    assert stream.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert "content-length" not in stream.headers


@pytest.mark.parametrize("name", REFUSED)
def test_what_fails_before_there_is_anything_to_show_has_its_own_status(rehearsal: Program, name: str) -> None:
    asked, status = REFUSED[name]
    reply = ask(rehearsal, *asked)
    assert (reply.status, reply.headers["content-type"]) == (status, "application/json")
    assert reply.error.keys() == ERROR_KEYS


def test_all_fields_that_the_api_promises_are_there(good: Reply) -> None:
    for frame in good.frames:
        told = frame.data
        assert {"b64_json", "created_at", "size", "quality", "background", "output_format"} <= told.keys()
        assert isinstance(told["created_at"], int)
        assert "url" not in told
        if frame.event.endswith("partial_image"):
            assert isinstance(told["partial_image_index"], int)
        else:
            assert {"total_tokens", "input_tokens", "output_tokens", "input_tokens_details"} <= told["usage"].keys()
            assert told["size"] == "64x64"


def test_there_are_as_many_previews_as_were_asked_for(streams: dict[str, Reply]) -> None:
    for name, (_, asked) in {**GOOD, "a backend with previews": REHEARSED["a backend with previews"]}.items():
        seen = [
            (frame.data["image_index"], frame.data["partial_image_index"])
            for frame in streams[name].frames
            if frame.event.endswith("partial_image")
        ]
        wanted = [
            (image, index) for image in range(asked.get("n", 1)) for index in range(asked.get("partial_images", 0))
        ]
        assert sorted(seen) == wanted, name
        assert [index for image, index in seen if image == 0] == list(range(asked.get("partial_images", 0))), name


def test_events_are_named_after_the_route(streams: dict[str, Reply]) -> None:
    for name, (path, _) in {**GOOD, **REHEARSED}.items():
        kind = "image_edit." if path == EDITS else "image_generation."
        assert all(event.startswith((kind, "error")) for event in streams[name].events), name


def test_previews_come_while_the_picture_is_drawn(slow: Program) -> None:
    seen: list[int] = []
    reply = ask(
        slow, *generation(model="slow", partial_images=3), on_piece=lambda reply: seen.append(len(reply.frames))
    )
    assert seen[0] < seen[-1] == 4
    assert reply.arrivals[-1] - reply.arrivals[0] > 1


def test_the_request_is_known_by_its_id(stream: Reply) -> None:
    assert stream.headers["x-request-id"]


def test_nobody_in_between_keeps_a_stream_back(stream: Reply) -> None:
    """Proxies hold replies back to compress or keep them, unless they are told not to."""
    assert "no-cache" in stream.headers["cache-control"]
    assert stream.headers["x-accel-buffering"] == "no"
