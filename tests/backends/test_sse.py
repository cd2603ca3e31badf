"""Server-sent events: the same ones come out however the bytes are cut."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from img_serving.backends.sse import Event, EventReader

LIMIT = 1 << 20


def read(stream: bytes, *cuts: int, limit: int = LIMIT) -> list[Event]:
    reader = EventReader(limit)
    edges = [0, *sorted(cuts), len(stream)]
    events = []
    for start, stop in pairwise(edges):
        events += reader.feed(stream[start:stop])
    return events + reader.finish()


@pytest.mark.parametrize(
    ("stream", "events"),
    [
        (b"event: a\ndata: 1\n\n", [Event("a", b"1")]),
        (b"event: a\r\ndata: 1\r\n\r\n", [Event("a", b"1")]),
        (b"event: a\rdata: 1\r\r", [Event("a", b"1")]),
        (b"\xef\xbb\xbfdata: 1\n\n", [Event("", b"1")]),
        (b"data: 1\ndata: 2\ndata:\n\n", [Event("", b"1\n2\n")]),
        (b": keepalive\n\ndata: 1\n: another\n\n", [Event("", b"1")]),
        (b"data:1\n\ndata:  1\n\n", [Event("", b"1"), Event("", b" 1")]),
        (b"event: a\n\ndata: 1\n\n", [Event("", b"1")]),  # without data it is none, and leaves no name behind
        (b"id: 7\nretry: 10\nfoo\ndata: 1\n\n", [Event("", b"1")]),
        (b"data: 1\n\ndata: 2", [Event("", b"1"), Event("", b"2")]),
        (b"data: 1\n", [Event("", b"1")]),
        (b"\n\n\n", []),
        (b"", []),
        (b"data\n\n", []),
        (b"event: \xff\ndata: x\n\n", [Event("\ufffd", b"x")]),
    ],
)
def test_events_are_read_as_whatwg_says_and_the_last_needs_no_blank_line(stream, events):
    assert read(stream) == events
    assert read(stream, *range(1, len(stream))) == events


def test_the_id_to_go_on_behind_is_that_of_the_last_event_that_came_whole():
    reader = EventReader(LIMIT)
    told = []
    for piece in (b"data: 1\n\n", b"id: 7\ndata: 2\n", b"\n", b": note\n\ndata: 3\n\n", b"id: 8\0\nid: 9\ndata: 4"):
        reader.feed(piece)
        told.append(reader.last_id)
    assert told == ["", "", "7", "7", "7"]


LINES = st.lists(
    st.one_of(
        st.sampled_from([b"", b"event: a", b"data: x", b"data:", b": note", b"data: \xed\x95\x9c", b"id: 1"]),
        st.binary(max_size=12).map(lambda junk: b"data: " + junk.translate(None, b"\r\n")),
    ),
    max_size=12,
)


@given(
    lines=LINES,
    ends=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r"]), min_size=12, max_size=12),
    cuts=st.lists(st.integers(0, 200), max_size=20),
)
def test_however_a_stream_is_cut_the_events_are_the_same(lines, ends, cuts):
    stream = b"".join(line + end for line, end in zip(lines, ends, strict=False))
    assert read(stream, *[min(cut, len(stream)) for cut in cuts]) == read(stream)


@given(junk=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300), max_size=10))
def test_rubbish_is_read_the_same_however_it_is_cut(junk, cuts):
    assert read(junk, *[min(cut, len(junk)) for cut in cuts]) == read(junk)


def test_a_picture_of_many_megabytes_is_one_event():
    text = b"A" * (30 << 20)
    reader = EventReader(64 << 20)
    stream = b"data: " + text + b"\n\n"
    events = []
    for at in range(0, len(stream), 64 * 1024):
        events += reader.feed(stream[at : at + 64 * 1024])
    assert [len(event.data) for event in events] == [len(text)]


@pytest.mark.parametrize("piece", [b"x" * 100, b"data: x\n", b"data:\n"])
def test_nothing_may_grow_without_end(piece):
    reader = EventReader(1000)

    def feed_on() -> None:
        for _ in range(2000):
            reader.feed(piece)

    with pytest.raises(ValueError, match="over 1000 bytes"):
        feed_on()


def test_events_that_end_do_not_add_up():
    reader = EventReader(1000)
    for _ in range(1000):
        assert len(reader.feed(b"data: " + b"x" * 500 + b"\n\n")) == 1
