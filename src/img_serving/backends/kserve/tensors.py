"""Tensors as the Open Inference Protocol carries them: values to raw little-endian bytes, and replies back. Pure.

Sources: the protocol's "Tensor data" page (row-major, little-endian, BYTES elements behind their length), and Triton 2.51 and
kserve 0.21, which answer raw contents whatever the request had; others answer typed ones.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from img_serving.domain.vocabulary import shown
from img_serving.wire.inference.open_inference_pb2 import InferTensorContents, ModelInferResponse

Value = str | bytes | bool | int | float

FORMATS: Final[Mapping[str, str]] = {
    "BOOL": "?", "UINT8": "B", "UINT16": "H", "UINT32": "I", "UINT64": "Q", "INT8": "b", "INT16": "h", "INT32": "i",
    "INT64": "q", "FP16": "e", "FP32": "f", "FP64": "d",
}  # fmt: skip
"""The numbers, as `struct` calls them; BF16 and BYTES are written in other ways."""

DATATYPES: Final = (*FORMATS, "BF16", "BYTES")
INTEGERS: Final = frozenset(name for name, letter in FORMATS.items() if letter in "BHIQbhiq")

ELEMENTS_LIMIT: Final = 4096
"""Elements of one BYTES tensor that are looked at: 256 MiB of empty ones would be 64 million."""

_LENGTH = struct.Struct("<I")
_TYPED: Final = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor with its contents in raw form. `shape` has no negative sides."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes

    def __repr__(self) -> str:
        return f"<Tensor {self.name}: {self.datatype} {list(self.shape)}, {len(self.data)} bytes>"


def width_of(datatype: str) -> int | None:
    """Bytes of one element; None where elements differ in length, or the datatype is none that is known."""
    if datatype == "BF16":
        return 2
    letter = FORMATS.get(datatype)
    return None if letter is None else struct.calcsize(f"<{letter}")


def pack(datatype: str, values: Sequence[Value]) -> bytes:
    """The raw contents of a tensor with these elements, row by row.

    Numbers for BYTES are written as text, texts for numbers are read as such; a fraction for a whole number is rounded.

    Raises:
        ValueError: a value that the datatype cannot hold, or a datatype that is none.
    """
    if datatype == "BYTES":
        return b"".join(part for value in values for part in _element(value))
    if datatype not in DATATYPES:
        raise ValueError(f"there is no datatype {shown(datatype)} (known: {', '.join(DATATYPES)})")
    numbers = [_number(datatype, value) for value in values]
    try:
        if datatype == "BF16":
            # the upper half of a 32-bit number, rounded to the nearest
            return b"".join(
                struct.pack("<H", min(struct.unpack("<I", struct.pack("<f", one))[0] + 0x8000, 0xFFFFFFFF) >> 16)
                for one in numbers
            )
        return struct.pack(f"<{len(numbers)}{FORMATS[datatype]}", *numbers)
    except (struct.error, OverflowError):
        shown_values = ", ".join(str(one) for one in numbers[:4])
        raise ValueError(f"{datatype} cannot hold {shown_values}") from None


def wrapped(datatype: str, seed: int) -> int:
    """A seed as a tensor of whole numbers holds it: what does not fit wraps, and none is negative."""
    bits = 8 * (width_of(datatype) or 8) if datatype in INTEGERS else 53  # doubles are exact up to there
    return seed % (1 << (bits - datatype.startswith("INT")))


def elements(tensor: Tensor) -> list[bytes]:
    """The elements of a BYTES tensor.

    Raises:
        ValueError: its bytes are not made of lengths and contents, or are not as many as its shape says.
    """
    count = math.prod(tensor.shape)
    if count > ELEMENTS_LIMIT:
        raise ValueError(f"the tensor {shown(tensor.name)} has {count} elements, and nobody draws as many pictures")
    view, at, found = memoryview(tensor.data), 0, list[bytes]()
    while at < len(view) and len(found) <= count:
        if at + 4 > len(view):
            raise ValueError(f"the tensor {shown(tensor.name)} is cut short: a length of {len(view) - at} bytes")
        (length,) = _LENGTH.unpack_from(view, at)
        at += 4
        if at + length > len(view):
            raise ValueError(
                f"the tensor {shown(tensor.name)} is cut short: an element of {length} bytes, of which {len(view) - at} came"
            )
        found.append(bytes(view[at : at + length]))
        at += length
    if len(found) != count:
        more = "more" if len(found) > count else "fewer"
        raise ValueError(
            f"the tensor {shown(tensor.name)} has {more} elements than its shape {list(tensor.shape)} says"
        )
    return found


def numbers(tensor: Tensor) -> list[int | float | bool]:
    """The elements of a tensor of numbers.

    Raises:
        ValueError: it is none, or its bytes are not as many as its shape says.
    """
    letter = FORMATS.get(tensor.datatype)
    if letter is None:
        raise ValueError(f"the tensor {shown(tensor.name)} is of {shown(tensor.datatype)}, which is no plain number")
    check_length(tensor)
    return list(struct.unpack(f"<{math.prod(tensor.shape)}{letter}", tensor.data))


def check_length(tensor: Tensor) -> None:
    """Hold a tensor of numbers against its shape, before anything is made of it.

    Raises:
        ValueError: it has more bytes or fewer than its shape says.
    """
    width = width_of(tensor.datatype)
    if width is None:
        raise ValueError(f"the tensor {shown(tensor.name)} is of {shown(tensor.datatype)}, which holds no numbers")
    wanted = width * math.prod(tensor.shape)
    if len(tensor.data) != wanted:
        raise ValueError(
            f"the tensor {shown(tensor.name)} of {tensor.datatype} {list(tensor.shape)} has {len(tensor.data)} bytes "
            f"instead of {wanted}"
        )


def tensors_of(response: ModelInferResponse) -> dict[str, Tensor]:
    """The outputs of a reply by name, typed contents brought into raw form.

    Raises:
        ValueError: contents are missing, or a shape is none.
    """
    raw = response.raw_output_contents
    if raw and len(raw) != len(response.outputs):
        raise ValueError(f"{len(response.outputs)} outputs, and contents of {len(raw)}")
    found = {}
    for index, output in enumerate(response.outputs):
        shape = tuple(output.shape)
        if any(side < 0 for side in shape):
            raise ValueError(f"the tensor {shown(output.name)} has the shape {list(shape)}")
        data = raw[index] if raw else _raw_of(output.name, output.datatype, output.contents)
        found[output.name] = Tensor(output.name, output.datatype, shape, data)
    return found


def _raw_of(name: str, datatype: str, contents: InferTensorContents) -> bytes:
    if datatype == "BYTES":
        return pack("BYTES", contents.bytes_contents)
    field = _TYPED.get(datatype)
    if field is None:
        raise ValueError(
            f"the tensor {shown(name)} of {shown(datatype)} has no raw contents, and there is no other form"
        )
    return pack(datatype, getattr(contents, field))


def _element(value: Value) -> Iterable[bytes]:
    data = value if isinstance(value, bytes) else str(value).encode()
    return _LENGTH.pack(len(data)), data


def _number(datatype: str, value: Value) -> int | float | bool:
    if isinstance(value, bytes):
        raise ValueError(f"{datatype} holds no bytes")  # noqa: TRY004 - one kind of error for one kind of mistake
    if isinstance(value, str):
        text = value
        try:
            value = float(text) if datatype not in INTEGERS else int(text)
        except ValueError:
            raise ValueError(f"{datatype} holds no text such as {shown(text)!r}") from None
    if datatype == "BOOL":
        return bool(value)
    if datatype not in INTEGERS:
        return float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{datatype} cannot hold {value}")
    return round(value)
