"""Events that carry a picture's bytes, written and read without copying them more often than must be.

The messages are those of `proto/img_serving/v1`, and every protobuf library reads and writes them. Ours would copy a picture
twice on each side (into the message, out of the message); here its bytes are joined to the rest once, and read in place.
The encoding is protobuf's own: https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from google.protobuf.message import DecodeError

from img_serving.wire.v1 import generation_pb2 as pb

_VARINT, _I64, _LEN, _I32 = 0, 1, 2, 5
_PICTURE: Final = pb.GenerateEvent.PICTURE_FIELD_NUMBER
_CHUNK: Final = pb.GenerateEvent.CHUNK_FIELD_NUMBER
_PICTURE_DATA: Final = pb.Picture.DATA_FIELD_NUMBER
_CHUNK_DATA: Final = pb.Chunk.DATA_FIELD_NUMBER
_SMALL: Final = 4096
"""Events of fewer bytes are left to the library."""


class Carried:
    """A picture or chunk event that was read in place: `head` is the message without its bytes, `data` is a view of them."""

    __slots__ = ("data", "head")

    def __init__(self, head: pb.Picture | pb.Chunk, data: memoryview) -> None:
        self.head = head
        self.data = data


def picture_event(head: pb.Picture, data: memoryview | bytes) -> bytes:
    """The event `picture`, with `data` as its bytes; `head` has none."""
    return _event(_PICTURE, head.SerializeToString(), _PICTURE_DATA, data)


def chunk_event(index: int, data: memoryview | bytes) -> bytes:
    """The event `chunk` of an item."""
    return _event(_CHUNK, pb.Chunk(index=index).SerializeToString(), _CHUNK_DATA, data)


def event_bytes(event: pb.GenerateEvent | bytes) -> bytes:
    """An event as it travels: one from above as it is."""
    return event if isinstance(event, bytes) else event.SerializeToString()


def read_event(raw: bytes) -> pb.GenerateEvent | Carried:
    """An event that came, a picture's bytes left where they are.

    Raises:
        ValueError: it is no message of ours.
    """
    try:
        carried = _carried(memoryview(raw)) if len(raw) >= _SMALL else None
        return pb.GenerateEvent.FromString(raw) if carried is None else carried
    except DecodeError:
        raise ValueError("the message cannot be read") from None


def fields_of(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The fields of a message, in order: their numbers, and the bytes of those that have a length (else none).

    Raises:
        ValueError: it is no message.
    """
    at = 0
    while at < len(view):
        key, at = _read_varint(view, at)
        if key & 7 == _LEN:
            length, at = _read_varint(view, at)
            value, at = view[at : at + length], at + length
        else:
            value, at = view[:0], _skip(view, at, key & 7)
        if at > len(view):
            raise ValueError("the message is cut short")
        yield key >> 3, value


def _event(field: int, head: bytes, data_field: int, data: memoryview | bytes) -> bytes:
    before = head + _tag(data_field, _LEN) + _varint(len(data))
    return b"".join((_tag(field, _LEN), _varint(len(before) + len(data)), before, data))


def _carried(view: memoryview) -> Carried | None:
    """None where the event is of another kind, or has more in it than one picture or chunk."""
    key, at = _read_varint(view, 0)
    field, kind = key >> 3, key & 7
    if kind != _LEN or field not in {_PICTURE, _CHUNK}:
        return None
    length, at = _read_varint(view, at)
    if at + length != len(view):
        return None
    wanted = _PICTURE_DATA if field == _PICTURE else _CHUNK_DATA
    head, data = bytearray(), view[:0]
    while at < len(view):
        begin = at
        key, at = _read_varint(view, at)
        if key == wanted << 3 | _LEN:
            length, at = _read_varint(view, at)
            data, at = view[at : at + length], at + length
        else:
            at = _skip(view, at, key & 7)
            head += view[begin:at]
        if at > len(view):
            raise ValueError("the message is cut short")
    message: pb.Picture | pb.Chunk = (
        pb.Picture.FromString(bytes(head)) if field == _PICTURE else pb.Chunk.FromString(bytes(head))
    )
    return Carried(message, data)


def _skip(view: memoryview, at: int, kind: int) -> int:
    """Behind a field's value."""
    if kind == _VARINT:
        return _read_varint(view, at)[1]
    if kind == _LEN:
        length, at = _read_varint(view, at)
        return at + length
    if kind in {_I64, _I32}:
        return at + (8 if kind == _I64 else 4)
    raise ValueError("the message has a field of a kind that does not exist")


def _tag(field: int, kind: int) -> bytes:
    return bytes((field << 3 | kind,))  # all our field numbers are below 16


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _read_varint(view: memoryview, at: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        if at >= len(view) or shift > 63:
            raise ValueError("the message is cut short")
        byte = view[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
