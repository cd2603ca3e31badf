"""Events written and read in place are what the library writes and reads."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.wire.pictures import Carried, chunk_event, event_bytes, picture_event, read_event
from img_serving.wire.v1 import generation_pb2 as pb

steady = settings(deadline=None, derandomize=True)
HEAD = pb.Picture(
    index=3, media_type="image/png", size_bytes=2**33, seed=2**63 - 1, revised_prompt="등대", ignored=["style"]
)
sizes = st.sampled_from([0, 1, 127, 128, 4095, 4096, 16_383, 16_384, 300_000])


def bytes_of(size: int) -> bytes:
    return bytes(index % 251 for index in range(size))


@steady
@given(sizes)
def test_the_library_reads_what_was_written_in_place(size: int) -> None:
    data = bytes_of(size)
    whole = pb.GenerateEvent.FromString(picture_event(HEAD, memoryview(data)))
    assert whole.WhichOneof("event") == "picture"
    assert whole.picture.data == data
    whole.picture.data = b""
    assert whole.picture == HEAD
    part = pb.GenerateEvent.FromString(chunk_event(5, data))
    assert (part.chunk.index, part.chunk.data) == (5, data)


@steady
@given(sizes)
def test_what_the_library_wrote_is_read_in_place(size: int) -> None:
    data = bytes_of(size)
    event = pb.GenerateEvent(picture=pb.Picture(index=3, media_type="image/png", data=data, seed=9))
    read = read_event(event_bytes(event))
    if len(event_bytes(event)) < 4096:
        assert read == event
        return
    assert isinstance(read, Carried)
    assert bytes(read.data) == data
    assert read.head == pb.Picture(index=3, media_type="image/png", seed=9)


def test_other_large_events_are_the_librarys() -> None:
    event = pb.GenerateEvent(preview=pb.Preview(index=1, data=bytes(9000), media_type="image/png"))
    assert read_event(event.SerializeToString()) == event


def test_a_picture_with_something_beside_it_is_the_librarys() -> None:
    event = pb.GenerateEvent(picture=pb.Picture(index=1, data=bytes(9000)))
    beside = event.SerializeToString() + bytes([0xF8, 0x07, 0x01])  # field 127, a number
    read = read_event(beside)
    assert isinstance(read, pb.GenerateEvent)
    assert len(read.picture.data) == 9000


@steady
@given(st.binary(max_size=60))
def test_noise_is_an_error_or_an_event_and_nothing_else(noise: bytes) -> None:
    with contextlib.suppress(ValueError):
        read_event(noise + bytes(4096))


@steady
@given(st.integers(0, 9100), st.integers(0, 255))
def test_a_damaged_event_is_an_error_or_an_event_and_nothing_else(place: int, value: int) -> None:
    raw = bytearray(picture_event(HEAD, bytes(9000)))
    raw[place % len(raw)] = value
    for damaged in (bytes(raw), bytes(raw[: place % len(raw)])):
        try:
            read_event(damaged)
        except ValueError:
            continue


@pytest.mark.parametrize("cut", [1, 2, 100, 4990])
def test_an_event_cut_short_is_an_error(cut: int) -> None:
    with pytest.raises(ValueError, match="message"):
        read_event(picture_event(HEAD, bytes(9000))[:-cut])
