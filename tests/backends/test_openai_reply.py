"""Streams of the OpenAI adapter: unfinished pictures on the way, and the finished one however the stream ends."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import pytest
from msgspec import structs
from tests.support.fake_openai import FakeOpenAI, drawn, sse
from tests.support.openai_calls import PROMPT, call_of, draw, picture_of

from img_serving.backends.openai.reply import StreamedReply
from img_serving.domain.errors import AttemptError, BackendRefusal, Outcome
from img_serving.domain.images import Artifact, Progress
from img_serving.media.payload import raw_bytes

HOSTED = {"preset": "openai"}
CALL = call_of(7, model="gpt-image-1", size=(1024, 1024), previews=True)
PICTURE = drawn(PROMPT, 100, (1024, 1024), notes="[]")

Spoil = Callable[[list[bytes]], AsyncIterator[bytes]]


def spoiled(*pieces: bytes | type[Exception], keep: int = 0) -> Spoil:
    """Streams of the first `keep` good events (all for -1), and then these pieces; an exception cuts the connection."""

    async def events(good: list[bytes]) -> AsyncIterator[bytes]:
        for one in good if keep < 0 else good[:keep]:
            yield one
        for piece in pieces:
            if not isinstance(piece, bytes):
                raise piece
            yield piece

    return events


def streamed(events: Spoil | None = None, call=CALL):
    return draw(FakeOpenAI("openai", events=events), call, HOSTED)


def test_unfinished_pictures_are_told_and_the_finished_one_is_kept():
    result = streamed()
    (artifact,) = result.artifacts
    assert raw_bytes(artifact) == PICTURE
    asked = result.server.posts[0].json
    assert (asked["stream"], asked["partial_images"]) == (True, 2)
    assert [(one.done, one.total) for one in result.progress] == [(1, 3), (2, 3), (3, 3)]
    previews = [one.preview for one in result.progress]
    assert [(one.media_type, one.index) for one in previews if one is not None] == [("image/png", 0)] * 2
    assert [one.share for one in previews if one is not None] == [1 / 3, 2 / 3]
    assert previews[2] is None


@pytest.mark.parametrize("wanted", [1, 2, 3])
def test_as_many_are_asked_for_as_the_client_wants(wanted):
    watched = structs.replace(CALL, request=structs.replace(CALL.request, previews=wanted))
    assert streamed(call=watched).server.posts[0].json["partial_images"] == wanted


def test_a_call_whose_pictures_nobody_watches_is_an_ordinary_one():
    result = streamed(call=call_of(7, model="gpt-image-1", size=(1024, 1024)))
    assert "stream" not in result.server.posts[0].json
    assert result.progress == []


def test_several_pictures_are_not_streamed_for_nothing_tells_whose_a_part_is():
    result = streamed(call=call_of(7, 8, model="gpt-image-1", size=(1024, 1024), previews=True))
    assert "stream" not in result.server.posts[0].json
    assert len(result.artifacts) == 2


def test_an_edit_is_streamed_too():
    call = call_of(7, model="gpt-image-1", size=None, operation="edit", images=(picture_of(),), previews=True)
    result = streamed(call=call)
    assert result.server.last["stream"]
    assert len(result.progress) == 3
    assert isinstance(result.results[0], Artifact)


def test_a_server_that_knows_no_streams_simply_answers():
    result = draw(FakeOpenAI("sdcpp"), call_of(7, previews=True), {"stream": True})
    assert isinstance(result.results[0], Artifact)
    assert result.progress == []


@pytest.mark.parametrize(
    "events",
    [
        spoiled(b"data: [DONE]\n\n", keep=-1),
        spoiled(b": keepalive\n\nevent: ping\ndata: {}\n\n", keep=-1),
        spoiled(ConnectionResetError, keep=-1),
        spoiled(b"event: error\ndata: {broken", keep=-1),
    ],
    ids=["done", "comments and pings", "cut behind it", "rubbish behind it"],
)
def test_a_finished_picture_is_not_lost_by_what_comes_behind_it(events):
    assert raw_bytes(streamed(events).artifacts[0]) == PICTURE


def test_however_a_stream_is_cut_into_pieces_the_picture_is_the_same():
    async def in_pieces(good: list[bytes]) -> AsyncIterator[bytes]:
        stream = b"\xef\xbb\xbf" + b"".join(good).replace(b"\n", b"\r\n")[:-2]  # no blank line at the end
        for at in range(0, len(stream), 997):
            yield stream[at : at + 997]

    assert raw_bytes(streamed(in_pieces).artifacts[0]) == PICTURE


@pytest.mark.parametrize("events", [spoiled(keep=2), spoiled(keep=0), spoiled(ConnectionResetError, keep=1)])
def test_a_stream_that_ends_without_its_picture_may_have_drawn_it(events):
    with pytest.raises(AttemptError) as caught:
        streamed(events)
    assert caught.value.outcome is Outcome.UNKNOWN


def error_event(body: object, name: str = "error") -> Spoil:
    return spoiled(sse(name, body), keep=1)


@pytest.mark.parametrize(
    ("body", "kind", "code"),
    [
        (
            {"type": "error", "error": {"type": "image_generation_user_error", "code": "moderation_blocked", "message": "no"}},
            BackendRefusal, "moderation_blocked",
        ),
        ({"type": "error", "code": "moderation_blocked", "message": f"no {PROMPT}"}, BackendRefusal, "moderation_blocked"),
        ({"error": {"type": "invalid_request_error", "param": "size", "message": "bad"}}, BackendRefusal, "invalid_value"),
        ({"type": "error", "error": {"code": "rate_limit_exceeded", "message": "slow"}}, AttemptError, Outcome.NOT_STARTED),
        ({"type": "error", "error": {"code": "insufficient_quota", "message": "pay"}}, AttemptError, Outcome.FAILED),
        ({"type": "error", "error": {"message": "boom"}}, AttemptError, Outcome.FAILED),
        ({"error": "boom"}, AttemptError, Outcome.FAILED),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["error", "message"])
def test_an_error_event_means_what_an_error_reply_would(body, kind, code, name):
    with pytest.raises(kind) as caught:
        streamed(error_event(body, name))
    error = caught.value
    assert (error.error.code if isinstance(error, BackendRefusal) else error.outcome) == code
    assert PROMPT not in str(error)


@pytest.mark.parametrize(
    "rubbish",
    [b"data: {\n\n", b"data: 5\n\n", b'data: {"b64_json": 5}\n\n', b"data: " + b"[" * 9999, b"data: ping\n\n"],
)
def test_odd_words_between_the_pictures_cost_nothing(rubbish):
    async def events(good: list[bytes]) -> AsyncIterator[bytes]:
        yield rubbish + b"\n\n"
        for one in good:
            yield one

    assert raw_bytes(streamed(events).artifacts[0]) == PICTURE
    with pytest.raises(AttemptError) as caught:
        streamed(spoiled(rubbish + b"\n\n"))
    assert caught.value.outcome is Outcome.UNKNOWN


def test_an_error_in_plain_words_is_told():
    with pytest.raises(AttemptError, match="out of memory"):
        streamed(spoiled(b"event: error\ndata: out of memory\n\n", keep=1))


def test_a_picture_that_is_there_is_not_waited_for_where_the_stream_goes_on():
    async def for_ever(good: list[bytes]) -> AsyncIterator[bytes]:
        for one in good:
            yield one
        while True:
            yield b": still here\n\n"
            await asyncio.sleep(0.01)

    call = call_of(7, model="gpt-image-1", size=(1024, 1024), previews=True, timeout_seconds=5.0)
    assert raw_bytes(streamed(for_ever, call).artifacts[0]) == PICTURE


def test_a_preview_that_is_no_picture_does_not_cost_the_picture():
    partial = sse("image_generation.partial_image", {"b64_json": "!!", "partial_image_index": "x"})
    other = sse("image_generation.partial_image", {"b64_json": "R0lGODlh"})

    async def events(good: list[bytes]) -> AsyncIterator[bytes]:
        for one in (partial, other, good[-1]):
            yield one

    result = streamed(events)
    assert [one.preview for one in result.progress] == [None, None, None]
    assert isinstance(result.results[0], Artifact)


def test_events_without_a_type_of_their_own_are_known_by_their_name():
    async def events(good: list[bytes]) -> AsyncIterator[bytes]:
        body = json.loads(good[-1].partition(b"data: ")[2])
        yield sse("image_generation.completed", {"b64_json": body["b64_json"]})

    assert raw_bytes(streamed(events).artifacts[0]) == PICTURE


def test_a_part_renews_the_time_out_and_a_ping_does_not():
    async def slowly(good: list[bytes]) -> AsyncIterator[bytes]:
        for _ in range(6):
            await asyncio.sleep(0.1)
            yield good[0]
        yield good[-1]

    async def pinging(good: list[bytes]) -> AsyncIterator[bytes]:
        for _ in range(8):
            await asyncio.sleep(0.1)
            yield b": still drawing, says a proxy\n\n"
        yield good[-1]

    call = call_of(7, model="gpt-image-1", size=(1024, 1024), previews=True, timeout_seconds=0.4)
    assert len(streamed(slowly, call).artifacts) == 1
    with pytest.raises(AttemptError, match="no progress"):
        streamed(pinging, call)


def test_a_stream_that_falls_silent_is_given_up():
    async def silent(good: list[bytes]) -> AsyncIterator[bytes]:
        yield good[0]
        await asyncio.sleep(30)

    call = call_of(7, model="gpt-image-1", size=(1024, 1024), previews=True, timeout_seconds=0.2)
    with pytest.raises(AttemptError, match="no progress") as caught:
        streamed(silent, call)
    assert caught.value.outcome is Outcome.UNKNOWN


def test_an_event_over_the_limit_is_read_no_further():
    told: list[Progress] = []
    stream = StreamedReply(told.append, lambda: None, limit_bytes=1000, partials=2)
    stream.feed(b"data: " + b"x" * 2000)
    stream.feed(sse("image_generation.completed", {"b64_json": "AAAA"}))
    stream.finish()
    assert stream.fault is not None
    assert "over 1000 bytes" in stream.fault
    assert not stream.reply.pictures
    assert not told
