"""Tensors to bytes and back: little-endian, row by row, BYTES behind their lengths."""

from __future__ import annotations

import math
import struct
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from img_serving.backends.kserve.options import Datatype
from img_serving.backends.kserve.tensors import (
    DATATYPES,
    ELEMENTS_LIMIT,
    FORMATS,
    INTEGERS,
    Tensor,
    elements,
    numbers,
    pack,
    tensors_of,
    width_of,
    wrapped,
)
from img_serving.wire.inference.open_inference_pb2 import ModelInferResponse

steady = settings(deadline=None, derandomize=True)


def tensor(datatype: str, shape: tuple[int, ...], data: bytes) -> Tensor:
    return Tensor("T", datatype, shape, data)


def range_of(datatype: str) -> tuple[int, int]:
    bits = 8 * (width_of(datatype) or 0)
    return (0, 2**bits - 1) if datatype.startswith("UINT") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


@steady
@given(st.lists(st.binary(max_size=40), max_size=20))
def test_bytes_come_back_as_they_went(parts):
    assert elements(tensor("BYTES", (len(parts),), pack("BYTES", parts))) == parts


@steady
@given(st.sampled_from(sorted(INTEGERS)), st.data())
def test_whole_numbers_come_back_as_they_went(datatype, data):
    values = data.draw(st.lists(st.integers(*range_of(datatype)), max_size=20))
    assert numbers(tensor(datatype, (len(values),), pack(datatype, values))) == values


@steady
@given(st.lists(st.floats(width=32), max_size=20))
def test_fractions_come_back_as_they_went(values):
    back = numbers(tensor("FP32", (len(values),), pack("FP32", values)))
    assert struct.pack(f"<{len(back)}f", *back) == struct.pack(f"<{len(values)}f", *values)


@steady
@given(st.sampled_from(sorted(INTEGERS)), st.integers())
def test_a_whole_number_fits_or_is_refused(datatype, value):
    low, high = range_of(datatype)
    if low <= value <= high:
        assert len(pack(datatype, [value])) == width_of(datatype)
    else:
        with pytest.raises(ValueError, match=f"{datatype} cannot hold"):
            pack(datatype, [value])


@steady
@given(st.sampled_from([*sorted(INTEGERS), "FP32", "FP64"]), st.integers(0, 2**63 - 1))
def test_every_seed_fits_once_it_is_wrapped(datatype, seed):
    own = wrapped(datatype, seed)
    assert own >= 0
    pack(datatype, [own])
    if datatype in {"INT64", "UINT64"}:
        assert own == seed


@steady
@given(st.binary(max_size=200), st.lists(st.integers(0, 5), max_size=3))
def test_no_bytes_do_more_than_be_refused(data, shape):
    for datatype in (*DATATYPES, "NONSENSE"):
        for read in (elements, numbers):
            try:
                found = read(tensor(datatype, tuple(shape), data))
            except ValueError:
                continue
            assert len(found) == math.prod(shape)


def test_numbers_are_little_endian():
    assert pack("INT32", [1, -1]) == b"\x01\0\0\0\xff\xff\xff\xff"
    assert pack("BYTES", ["é"]) == b"\x02\0\0\0\xc3\xa9"
    assert pack("BF16", [1.0, -2.5]) == b"\x80\x3f\x20\xc0"
    assert pack("FP16", [1.0]) == b"\0\x3c"
    assert pack("BOOL", [True, False]) == b"\x01\0"


def test_what_is_written_otherwise_is_read_as_it_is_meant():
    assert pack("BYTES", [7]) == pack("BYTES", ["7"])
    assert pack("INT32", [7.5, "3"]) == pack("INT32", [8, 3])
    assert pack("FP32", [7]) == pack("FP32", ["7.0"])


@pytest.mark.parametrize(
    ("datatype", "value", "says"),
    [
        ("INT8", "x", "holds no text"),
        ("INT32", float("nan"), "cannot hold nan"),
        ("FP16", 1e9, "cannot hold"),
        ("FP32", b"x", "holds no bytes"),
        ("TEXT", "x", "no datatype TEXT"),
    ],
)
def test_what_cannot_be_written_is_refused(datatype, value, says):
    with pytest.raises(ValueError, match=says):
        pack(datatype, [value])


@pytest.mark.parametrize(
    ("shape", "data", "says"),
    [
        ((1,), b"\x05\0\0\0abc", "cut short: an element of 5 bytes, of which 3 came"),
        ((1,), b"\x05\0", "cut short"),
        ((2,), b"\0\0\0\0", "fewer elements"),
        ((1,), b"\0\0\0\0" * 2, "more elements"),
        ((ELEMENTS_LIMIT, 2), b"", "nobody draws as many"),
    ],
)
def test_bytes_that_are_not_what_their_shape_says_are_refused(shape, data, says):
    with pytest.raises(ValueError, match=says):
        elements(tensor("BYTES", shape, data))


def test_millions_of_empty_elements_are_not_counted_to_the_end():
    with pytest.raises(ValueError, match="more elements"):
        elements(tensor("BYTES", (3,), bytes(4 * 5_000_000)))


def response(*outputs: tuple[str, str, list[int]], raw: list[bytes] | None = None) -> ModelInferResponse:
    made = ModelInferResponse(raw_output_contents=raw or [])
    for name, datatype, shape in outputs:
        made.outputs.add(name=name, datatype=datatype, shape=shape)
    return made


def test_raw_contents_belong_to_the_outputs_in_order():
    found = tensors_of(response(("A", "INT32", [1]), ("B", "BYTES", [1]), raw=[b"\1\0\0\0", b"\0\0\0\0"]))
    assert numbers(found["A"]) == [1]
    assert elements(found["B"]) == [b""]


def test_typed_contents_are_read_where_there_are_no_raw_ones():
    made = response(
        ("A", "UINT8", [2]), ("B", "BYTES", [1]), ("C", "FP32", [1]), ("D", "INT64", [1]), ("E", "BOOL", [1])
    )
    made.outputs[0].contents.uint_contents.extend([1, 255])
    made.outputs[1].contents.bytes_contents.append(b"picture")
    made.outputs[2].contents.fp32_contents.append(0.5)
    made.outputs[3].contents.int64_contents.append(-7)
    made.outputs[4].contents.bool_contents.append(True)
    found = tensors_of(made)
    assert numbers(found["A"]) == [1, 255]
    assert elements(found["B"]) == [b"picture"]
    assert [numbers(found[name])[0] for name in "CDE"] == [0.5, -7, True]


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (response(("A", "INT32", [1]), raw=[b"", b""]), "1 outputs, and contents of 2"),
        (response(("A", "INT32", [-1]), raw=[b""]), "shape"),
        (response(("A", "FP16", [1])), "no raw contents"),
    ],
)
def test_contents_that_are_not_there_are_refused(made, says):
    with pytest.raises(ValueError, match=says):
        tensors_of(made)


def test_the_datatypes_that_may_be_configured_are_those_that_can_be_written():
    assert set(DATATYPES) == set(get_args(Datatype))
    assert set(FORMATS) < set(DATATYPES)


def test_a_tensor_does_not_show_its_contents():
    assert repr(tensor("BYTES", (1,), b"a secret prompt")) == "<Tensor T: BYTES [1], 15 bytes>"
