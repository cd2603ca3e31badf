"""Messages that are small and unpack to millions of objects: counted before anything is unpacked."""

from __future__ import annotations

from typing import Final

from img_serving.wire.pictures import fields_of
from img_serving.wire.v1 import generation_pb2 as pb

MAX_FIELDS: Final = 20_000
"""Fields of one request, those of its items included: a thousand items with everything in them have a third of it."""

_ITEMS: Final = pb.GenerateRequest.ITEMS_FIELD_NUMBER


def has_too_many_fields(raw: bytes, most: int = MAX_FIELDS) -> bool:
    """Whether a `GenerateRequest` has more fields than any that is meant to be drawn: looks no further than that.

    Raises:
        ValueError: it is no protobuf message.
    """
    left = most
    for number, value in fields_of(memoryview(raw)):
        left -= 1
        if number == _ITEMS:
            for _ in fields_of(value):
                left -= 1
                if left < 0:
                    return True
        if left < 0:
            return True
    return False
