"""Pictures out of every usual tensor, and into it; and what is none."""

from __future__ import annotations

import io
import struct
import tracemalloc

import numpy as np
import pybase64
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from img_serving.backends.kserve.options import ModelOptions
from img_serving.backends.kserve.pictures import pictures_in, pixels_from, pixels_of, raw_pixels
from img_serving.backends.kserve.tensors import Tensor, pack
from img_serving.backends.scripted import picture
from img_serving.domain.images import Artifact, ItemFailure
from img_serving.media.payload import raw_bytes

PLAIN = ModelOptions()
ROW = np.array([[[0, 128, 255], [10, 20, 30]]], np.uint8)  # one pixel high, two wide
DTYPES = {"FP16": "<f2", "FP32": "<f4", "FP64": "<f8"}


steady = settings(deadline=None, derandomize=True)


def tensor(datatype: str, values: np.ndarray, shape: tuple[int, ...] | None = None) -> Tensor:
    return Tensor("IMAGE", datatype, shape or values.shape, values.tobytes())


def drawn_in(image: Tensor, *seeds: int) -> list[Artifact]:
    found = pictures_in(image, seeds, PLAIN)
    assert all(isinstance(one, Artifact) for one in found), found
    return [one for one in found if isinstance(one, Artifact)]


def colours_of(artifact: Artifact) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(raw_bytes(artifact))).convert("RGB"))


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 1, 2, 3), (1, 1, 1, 2, 3)])
def test_pixels_of_any_rank_are_a_picture(shape):
    (drawn,) = drawn_in(tensor("UINT8", ROW, shape), 7)
    assert (colours_of(drawn) == ROW).all()
    assert (drawn.media_type, drawn.width, drawn.height, drawn.seed) == ("image/png", 2, 1, 7)


def test_colours_may_come_first():
    planes = np.ascontiguousarray(ROW.transpose(2, 0, 1))
    assert (colours_of(drawn_in(tensor("UINT8", planes), 7)[0]) == ROW).all()


def test_layout_says_what_the_shape_leaves_open():
    cube = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert (pixels_of(tensor("UINT8", cube), 1, PLAIN)[0] == cube).all()
    turned = pixels_of(tensor("UINT8", cube), 1, ModelOptions(layout="chw"))[0]
    assert (turned == cube.transpose(1, 2, 0)).all()


def test_a_grey_picture_becomes_one_of_three_colours():
    (grey,) = pixels_of(tensor("UINT8", ROW[:, :, :1].copy()), 1, PLAIN)
    assert (grey == np.repeat(ROW[:, :, :1], 3, axis=2)).all()


@pytest.mark.parametrize("datatype", DTYPES)
@pytest.mark.parametrize(("value_range", "scaled"), [(None, 1), ("0..1", 1), ("-1..1", 2), ("0..255", 255)])
def test_fractions_are_read_in_their_range(datatype, value_range, scaled):
    values = ROW / 127.5 - 1 if scaled == 2 else ROW / (255 / scaled)
    found = pixels_of(tensor(datatype, values.astype(DTYPES[datatype])), 1, ModelOptions(value_range=value_range))[0]
    assert (found == ROW).all()


def test_the_brain_float_is_read():
    values = np.array([0.0, 0.5, 1.0], "<f4")
    data = (values.view("<u4") >> 16).astype("<u2").tobytes()
    assert pixels_of(Tensor("IMAGE", "BF16", (1, 1, 3), data), 1, PLAIN)[0].tolist() == [[[0, 128, 255]]]


def test_a_little_past_the_ends_is_cut_off():
    values = np.array([[[-0.1, 0.5, 1.2]]], np.float32)
    assert pixels_of(tensor("FP32", values), 1, PLAIN)[0].tolist() == [[[0, 128, 255]]]


@pytest.mark.parametrize(("low", "high", "right"), [(-1.0, 1.0, "-1..1"), (0.0, 255.0, "0..255")])
def test_values_of_another_range_are_refused_with_the_option_that_would_be_right(low, high, right):
    values = np.array([[[low, 0.5, high]]], np.float32)
    with pytest.raises(ValueError, match=f'value_range = "{right}"'):
        pixels_of(tensor("FP32", values), 1, PLAIN)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers_are_a_failure(bad):
    with pytest.raises(ValueError, match="no numbers"):
        pixels_of(tensor("FP32", np.array([[[0, bad, 1]]], np.float32)), 1, PLAIN)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((6,), "neither"),
        ((2, 3), "no room"),
        ((2, 3, 5), "neither"),
        ((0, 2, 3), "0"),
        ((2, 0, 3), "0"),
        ((1, 70_000, 3), "70000x1"),
        ((2, 1, 2, 3), "2 pictures for 3"),
        ((2, 1, 4), "neither"),
    ],
)
def test_nonsense_shapes_are_refused(shape, says):
    size = int(np.prod(shape))
    with pytest.raises(ValueError, match=says):
        pixels_of(Tensor("IMAGE", "UINT8", shape, bytes(size)), 3 if len(shape) == 4 else 1, PLAIN)


@pytest.mark.parametrize("datatype", ["INT64", "BOOL", "NONSENSE"])
def test_other_datatypes_hold_no_pixels(datatype):
    with pytest.raises(ValueError, match=r"pixels|numbers"):
        pixels_of(Tensor("IMAGE", datatype, (1, 1, 3), bytes(24 if datatype == "INT64" else 3)), 1, PLAIN)


def test_a_bomb_is_refused_before_anything_is_made_of_it():
    tracemalloc.start()
    try:
        for shape in ((60_000, 60_000, 3), (1, 2**40, 2**20, 3), (6000, 6000, 3)):
            with pytest.raises(ValueError, match=r"bytes|pixels"):
                pixels_of(Tensor("IMAGE", "UINT8", shape, b"\0" * 12), 1, PLAIN)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@steady
@given(st.lists(st.integers(0, 6), max_size=5), st.sampled_from(["UINT8", "FP16", "FP32", "BF16"]), st.integers(1, 3))
def test_any_shape_is_a_picture_or_refused(shape, datatype, count):
    width = {"UINT8": 1, "FP16": 2, "FP32": 4, "BF16": 2}[datatype]
    data = bytes(int(np.prod(shape)) * width)
    try:
        found = pixels_of(Tensor("IMAGE", datatype, tuple(shape), data), count, PLAIN)
    except ValueError:
        return
    assert len(found) == count
    assert all(one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3 for one in found)


def test_files_are_taken_as_they_are():
    files = [picture("a", 1, 8, 8), picture("b", 2, 8, 8)]
    drawn = drawn_in(Tensor("IMAGE", "BYTES", (2, 1), pack("BYTES", files)), 1, 2)
    assert [raw_bytes(one) for one in drawn] == files
    assert [one.seed for one in drawn] == [1, 2]


def test_files_may_come_as_base64():
    text = pybase64.b64encode(picture("a", 1, 8, 8))
    for spelt in (text, b"data:image/png;base64," + text):
        (drawn,) = drawn_in(Tensor("IMAGE", "BYTES", (1,), pack("BYTES", [spelt])), 1)
        assert raw_bytes(drawn) == picture("a", 1, 8, 8)


def test_a_file_that_is_no_good_fails_alone():
    good = picture("a", 1, 8, 8)
    drawn = pictures_in(Tensor("IMAGE", "BYTES", (3,), pack("BYTES", [good, b"", good[:40]])), [1, 2, 3], PLAIN)
    assert isinstance(drawn[0], Artifact)
    assert [type(one) for one in drawn[1:]] == [ItemFailure, ItemFailure]


def test_more_files_than_asked_for_are_good_for_one_picture_alone():
    two = Tensor("IMAGE", "BYTES", (2,), pack("BYTES", [picture("a", 1, 8, 8)] * 2))
    assert len(pictures_in(two, [1], PLAIN)) == 1
    with pytest.raises(ValueError, match="2 pictures for 3"):
        pictures_in(two, [1, 2, 3], PLAIN)


# into tensors


def png(colour: tuple[int, int, int], size: tuple[int, int] = (4, 2)) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def test_a_file_becomes_pixels_of_the_size_that_is_drawn():
    pixels = pixels_from(png((10, 20, 30)), 8, 6)
    assert pixels.shape == (6, 8, 3)
    assert pixels[3, 3].tolist() == [10, 20, 30]


@pytest.mark.parametrize(
    ("datatype", "value_range", "layout", "expected"),
    [
        ("UINT8", None, "hwc", bytes([0, 51, 255])),
        ("FP32", None, "hwc", struct.pack("<3f", 0, 0.2, 1)),
        ("FP32", "-1..1", "chw", struct.pack("<3f", -1, -0.6, 1)),
        ("FP32", "0..255", "chw", struct.pack("<3f", 0, 51, 255)),
        ("FP16", "0..1", "hwc", struct.pack("<3e", 0, 0.2, 1)),
        ("BF16", "0..255", "hwc", pack("BF16", [0, 51, 255])),
    ],
)
def test_pixels_travel_as_the_model_wants_them(datatype, value_range, layout, expected):
    pixels = [np.array([[[0, 51, 255]]], np.uint8)]
    data = raw_pixels(pixels, datatype, layout, ModelOptions(value_range=value_range))
    letters = {"FP32": "<3f", "FP16": "<3e"}
    if datatype in letters:
        assert struct.unpack(letters[datatype], data) == pytest.approx(
            struct.unpack(letters[datatype], expected), abs=1e-3
        )
    else:
        assert data == expected


def test_a_mask_is_from_0_to_1_in_every_range():
    mask = pixels_from(png((255, 255, 255), (2, 2)), 2, 2, is_mask=True)
    data = raw_pixels([mask], "FP32", "hwc", ModelOptions(value_range="-1..1"), is_mask=True)
    assert struct.unpack("<4f", data) == (1, 1, 1, 1)


@pytest.mark.parametrize("data", [b"", b"junk", png((0, 0, 0))[:40]], ids=["nothing", "junk", "cut"])
def test_a_file_that_is_no_picture_becomes_no_pixels(data):
    with pytest.raises(ValueError, match="decoded"):
        pixels_from(data, 8, 8)


def test_pixels_do_not_travel_as_anything():
    with pytest.raises(ValueError, match="INT64"):
        raw_pixels([np.zeros((1, 1, 3), np.uint8)], "INT64", "hwc", PLAIN)
