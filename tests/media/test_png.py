"""The byte-level PNG code: what Pillow reads back, what is taken out, and what garbage does to it."""

from io import BytesIO
from struct import pack
from zlib import compress, crc32

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from img_serving.media import png


def chunk(kind: bytes, body: bytes) -> bytes:
    return pack(">I", len(body)) + kind + body + pack(">I", crc32(kind + body))


def kinds(data: bytes) -> list[bytes]:
    return [kind for kind, _, _ in png._chunks(memoryview(data))]


def pixels_of(data: bytes) -> np.ndarray:
    with Image.open(BytesIO(data)) as image:
        image.load()
        return np.asarray(image.convert("RGBA"))


def picture(seed: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def with_metadata(width: int = 9, height: int = 7) -> bytes:
    """A picture as ComfyUI writes it: the prompt and the workflow in text chunks."""
    info = PngInfo()
    info.add_text("prompt", '{"3": {"class_type": "KSampler"}}')
    info.add_text("workflow", '{"nodes": []}', zip=True)
    info.add_itxt("note", "한국어")
    exif = Image.Exif()
    exif[0x010E] = "who painted this"
    out = BytesIO()
    Image.fromarray(picture(1, width, height)).save(out, "PNG", pnginfo=info, exif=exif, dpi=(72, 72))
    return out.getvalue()


@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 70),
    height=st.integers(1, 70),
    level=st.integers(0, 3),
)
def test_pillow_reads_back_the_pixels_that_were_written(seed: int, width: int, height: int, level: int) -> None:
    pixels = picture(seed, width, height)
    data = png.encode_png(pixels, level)
    assert np.array_equal(pixels_of(data)[..., :3], pixels)
    assert png.read_header(data) == (width, height)
    assert png.is_complete(data)


def test_a_view_with_gaps_is_written_like_its_copy() -> None:
    pixels = picture(2, 40, 30)[::2, ::-1]
    assert png.encode_png(pixels) == png.encode_png(pixels.copy())


def test_a_written_picture_holds_nothing_but_pixels() -> None:
    assert kinds(png.encode_png(picture(3, 20, 10))) == [b"IHDR", b"IDAT", b"IEND"]


def test_checksums_are_right() -> None:
    data = png.encode_png(picture(4, 20, 10))
    for kind, start, stop in png._chunks(memoryview(data)):
        assert chunk(kind, data[start + 8 : stop - 4]) == data[start:stop]


@pytest.mark.parametrize(
    "pixels",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 0, 3), np.uint8),
    ],
)
def test_what_is_no_rgb_picture_is_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixel"):
        png.encode_png(pixels)


@pytest.mark.parametrize("level", [-1, 4])
def test_an_unknown_level_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match="level"):
        png.encode_png(picture(5, 4, 4), level)


def test_stripping_takes_out_prompt_and_workflow_and_keeps_the_pixels() -> None:
    data = with_metadata()
    assert {b"tEXt", b"zTXt", b"iTXt", b"eXIf"} <= set(kinds(data))
    clean = png.strip_metadata(data)
    assert b"KSampler" not in clean
    assert b"workflow" not in clean
    assert set(kinds(clean)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}
    assert np.array_equal(pixels_of(clean), pixels_of(data))
    with Image.open(BytesIO(clean)) as image:
        assert "prompt" not in image.info


def test_stripping_keeps_palette_and_transparency() -> None:
    image = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8) % 4, "L").convert("P")
    out = BytesIO()
    image.save(out, "PNG", transparency=2, pnginfo=_note())
    data = out.getvalue()
    clean = png.strip_metadata(data)
    assert {b"PLTE", b"tRNS"} <= set(kinds(clean))
    assert b"tEXt" not in kinds(clean)
    assert np.array_equal(pixels_of(clean), pixels_of(data))


def test_time_private_chunks_and_a_tail_are_taken_out() -> None:
    plain = png.encode_png(picture(6, 5, 5))
    extra = chunk(b"tIME", bytes(7)) + chunk(b"prVt", b"secret") + chunk(b"caBX", b"secret")
    data = plain[:33] + extra + plain[33:] + b"PK\x03\x04 secret"
    assert png.strip_metadata(data) == plain


def test_an_unknown_critical_chunk_is_left_for_the_decoder_to_refuse() -> None:
    plain = png.encode_png(picture(6, 5, 5))
    data = plain[:33] + chunk(b"ABCD", b"x") + plain[33:]
    assert png.strip_metadata(data) == data


def test_clean_bytes_come_back_without_a_copy() -> None:
    data = png.encode_png(picture(7, 5, 5))
    assert png.strip_metadata(data) is data
    assert png.strip_metadata(memoryview(data)) == data


def test_every_cut_is_incomplete_and_no_cut_can_be_stripped() -> None:
    data = with_metadata()
    assert png.is_complete(data)
    for length in range(len(data)):
        assert not png.is_complete(data[:length])
        with pytest.raises(ValueError, match="PNG"):
            png.strip_metadata(data[:length])


def test_a_picture_without_pixels_is_incomplete() -> None:
    data = png.encode_png(picture(8, 5, 5))
    assert not png.is_complete(data[:33] + chunk(b"IEND", b""))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (2**31, 5), (5, 2**32 - 1)])
def test_an_impossible_size_is_refused(size: tuple[int, int]) -> None:
    data = png.SIGNATURE + chunk(b"IHDR", pack(">II", *size) + bytes((8, 2, 0, 0, 0)))
    with pytest.raises(ValueError, match="impossible size"):
        png.read_header(data)


def test_the_size_is_known_from_the_first_24_bytes() -> None:
    data = png.encode_png(picture(9, 31, 17))
    assert png.read_header(memoryview(data)[:24]) == (31, 17)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A real picture with some bytes replaced, maybe cut off, maybe with something behind."""
    data = bytearray(with_metadata())
    for at, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=6)):
        data[at] = value
    return bytes(data[: draw(st.integers(0, len(data)))]) + draw(st.binary(max_size=20))


@given(st.binary(max_size=80) | st.binary(max_size=80).map(png.SIGNATURE.__add__) | damaged())
def test_garbage_raises_nothing_but_value_error(data: bytes) -> None:
    complete = png.is_complete(data)
    assert isinstance(complete, bool)
    for read in (png.read_header, png.strip_metadata):
        try:
            read(data)
        except ValueError as error:
            assert str(error)  # noqa: PT017 - that nothing else comes is the point
            assert read is png.read_header or not complete
    if complete:
        assert png.is_complete(png.strip_metadata(data))


def _note() -> PngInfo:
    info = PngInfo()
    info.add_text("prompt", "a cat")
    return info


def test_a_decoder_is_not_given_text() -> None:
    """Pillow would inflate it: this file of a hundred kilobytes would cost 64 MiB."""
    whole = png.encode_png(np.zeros((4, 4, 3), np.uint8))
    texts = (
        chunk(b"tEXt", b"a\0b")
        + chunk(b"iTXt", b"a\0\0\0\0\0b")
        + chunk(b"zTXt", b"a\0\0" + compress(bytes(1 << 20))) * 60
    )
    assert png.without_text(whole[:33] + texts + whole[33:]) == whole
    assert png.without_text(whole) is whole
    for data in (b"", b"GIF89a", whole[:-3], whole[:40]):
        assert png.without_text(data) is data
