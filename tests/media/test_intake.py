"""What is let in of pictures that clients send: whole ones, one picture each, upright, nothing behind their end."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from img_serving.backends.scripted import picture
from img_serving.media import intake
from img_serving.media.intake import take_in

LIMITS: dict[str, int] = {"max_pixels": 1_000_000, "max_bytes": 1_000_000}


def art(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Something with a top that is light and a left side that is red."""
    art = Image.new("RGB", size, (40, 60, 90))
    art.paste((230, 230, 230), (0, 0, size[0], size[1] // 4))
    art.paste((200, 30, 30), (0, 0, size[0] // 6, size[1]))
    return art


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


FILES = {
    "png": saved(art(), "PNG"),
    "png of many chunks": saved(Image.effect_noise((300, 300), 90), "PNG"),
    "jpeg": saved(art(), "JPEG"),
    "progressive jpeg": saved(Image.effect_noise((200, 160), 90), "JPEG", progressive=True),
    "jpeg with restarts": saved(Image.effect_noise((200, 160), 90), "JPEG", restart_marker_rows=1),
    "webp": saved(art(), "WEBP"),
    "lossless webp": saved(art(), "WEBP", lossless=True),
    "webp with alpha": saved(art().convert("RGBA"), "WEBP"),
    "grey and alpha": saved(art().convert("LA"), "PNG"),
    "16 bits": saved(Image.new("I;16", (20, 10), 999), "PNG"),
    "cmyk": saved(art().convert("CMYK"), "JPEG"),
    "one pixel": saved(Image.new("RGB", (1, 1)), "PNG"),
}
ANY = pytest.mark.parametrize("name", FILES)


@ANY
def test_a_whole_picture_is_passed_on_as_it_came(name: str) -> None:
    taken = take_in(FILES[name], **LIMITS)
    assert taken.data is FILES[name]
    assert (taken.width, taken.height) == opened(FILES[name]).size
    assert taken.media_type == Image.MIME[str(Image.open(io.BytesIO(FILES[name])).format)]


@ANY
def test_one_that_is_cut_short_anywhere_is_refused(name: str) -> None:
    whole = FILES[name]
    for end in {*range(0, len(whole), max(1, len(whole) // 40)), len(whole) - 1, len(whole) - 2, len(whole) - 5}:
        with pytest.raises(ValueError, match=r"not a picture|cut short|damaged"):
            take_in(whole[:end], **LIMITS)


@ANY
@pytest.mark.parametrize(
    "tail", [b"\0", b"<script>alert(1)</script>", b"PK\3\4" + bytes(500), FILES["jpeg"], FILES["png"]]
)
def test_what_stands_behind_a_pictures_end_is_cut_off(name: str, tail: bytes) -> None:
    assert take_in(FILES[name] + tail, **LIMITS).data == FILES[name]


@pytest.mark.parametrize("name", ["png", "png of many chunks", "grey and alpha", "16 bits"])
def test_a_png_with_a_wrong_checksum_is_refused(name: str) -> None:
    for at in (20, len(FILES[name]) // 2, len(FILES[name]) - 14):
        broken = bytearray(FILES[name])
        broken[at] ^= 0x10
        with pytest.raises(ValueError, match=r"damaged|cut short|not a picture"):
            take_in(bytes(broken), **LIMITS)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(kind: str, orientation: int) -> None:
    lying = {
        1: lambda one: one,
        2: lambda one: one.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda one: one.transpose(Image.Transpose.ROTATE_180),
        4: lambda one: one.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda one: one.transpose(Image.Transpose.TRANSPOSE),
        6: lambda one: one.transpose(Image.Transpose.ROTATE_90),
        7: lambda one: one.transpose(Image.Transpose.TRANSVERSE),
        8: lambda one: one.transpose(Image.Transpose.ROTATE_270),
    }[orientation](art())
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(lying, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    taken = take_in(data, **LIMITS)
    assert (taken.width, taken.height) == (48, 32)
    assert (taken.data is data) == (orientation == 1), "and only then it is made anew"
    shown = opened(taken.data).convert("RGB")
    assert shown.size == (48, 32)
    assert shown.getexif().get(0x0112, 1) == 1, "nobody turns it a second time"
    difference = [abs(a - b) for a, b in zip(shown.tobytes(), art().tobytes(), strict=True)]
    assert sum(difference) / len(difference) < 6


def test_a_large_photograph_stays_a_jpeg_and_keeps_its_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "LOSSLESS_PIXELS", 1000)
    exif = Image.Exif()
    exif[0x0112] = 6
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    taken = take_in(saved(art(), "JPEG", exif=exif, icc_profile=profile), **LIMITS)
    assert (taken.media_type, taken.width, taken.height) == ("image/jpeg", 32, 48)
    assert opened(taken.data).info["icc_profile"] == profile


@pytest.mark.parametrize(
    "exif", [b"", b"Exif", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + bytes(30)]
)
def test_exif_that_means_nothing_turns_nothing(exif: bytes) -> None:
    app1 = b"\xff\xe1" + struct.pack(">H", 8 + len(exif)) + b"Exif\0\0" + exif
    data = FILES["jpeg"][:2] + app1 + FILES["jpeg"][2:]
    assert take_in(data, **LIMITS).data is data


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_an_animation_the_first_frame_is_taken(kind: str) -> None:
    frames = [Image.new("RGB", (40, 30), (255 - 60 * index, 20, 20)) for index in range(4)]
    data = saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=40, **(
        {"lossless": True} if kind == "WEBP" else {}
    ))  # fmt: skip
    assert getattr(opened(data), "n_frames", 1) == 4
    taken = take_in(data, **LIMITS)
    assert getattr(opened(taken.data), "n_frames", 1) == 1
    assert opened(taken.data).convert("RGB").getpixel((5, 5)) == (255, 20, 20)


def bomb(width: int, height: int) -> bytes:
    head = chunk(b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(10))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (bomb(60_000, 60_000), "a side may have at most 16384 pixels"),
        (bomb(16_385, 1), "a side may have at most 16384 pixels"),
        (bomb(2_000, 2_000), "4000000 pixels; at most 1000000"),
        (bomb(70_000, 1), "not a picture"),
        (FILES["png"] + bytes(1_000_000), "bytes; at most 1000000"),
        (b"", "not a picture"),
        (b"GIF89a" + bytes(100), "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", bytes(13)), "cut short"),
        (FILES["png"][:33] + chunk(b"tEXt", b"") * 100_001 + FILES["png"][33:], r"cut short|not a picture"),
        (b"\xff\xd8" + b"\xff\xfe\x00\x02" * 20_000 + FILES["jpeg"][2:], "not a picture"),
    ],
)
def test_what_is_too_large_or_no_picture_is_refused_in_words(data: bytes, words: str) -> None:
    max_bytes = 1_000_000 if "bytes" in words else 10_000_000
    with pytest.raises(ValueError, match=words):
        take_in(data, max_pixels=1_000_000, max_bytes=max_bytes)


def test_an_animation_that_cannot_be_decoded_is_refused() -> None:
    moving = chunk(b"acTL", struct.pack(">II", 2, 0))
    data = bomb(64, 64)
    with pytest.raises(ValueError, match="decoded"):
        take_in(data[:33] + moving + data[33:], **LIMITS)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Whatever is let in has a size that Pillow agrees with, or Pillow cannot read it either."""
    whole = bytearray(FILES[data.draw(st.sampled_from(sorted(FILES)))])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        if data.draw(st.booleans()):
            whole[at] = data.draw(st.integers(0, 255))
        else:
            del whole[at : at + data.draw(st.integers(1, 40))]
    try:
        taken = take_in(bytes(whole), **LIMITS)
    except ValueError:
        return
    assert taken.data
    try:
        size = Image.open(io.BytesIO(taken.data)).size
    except Exception:
        return
    assert size == (taken.width, taken.height)


def test_a_scripted_picture_is_one() -> None:
    assert take_in(picture("x", 1, 64, 48), **LIMITS).width == 64


@pytest.mark.parametrize(("scans", "words"), [(intake.MAX_SCANS, ""), (intake.MAX_SCANS + 1, "more than 100 scans")])
def test_a_jpeg_has_no_more_scans_than_encoders_write(scans: int, words: str) -> None:
    """Each is some bytes to who sends it, and a walk over every pixel to who decodes it."""
    data = saved(art(), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    longer = data[:at] + data[at:-2] * (scans + 1 - data.count(b"\xff\xda")) + data[-2:]
    if words:
        with pytest.raises(ValueError, match=words):
            take_in(longer, **LIMITS)
    else:
        assert take_in(longer, **LIMITS).data == longer


@pytest.mark.parametrize("pieces", [1, 4])
def test_a_jpeg_is_not_made_of_fill_bytes(pieces: int) -> None:
    """Some may stand before a marker; a megabyte would be read byte by byte by who decodes it."""
    data = saved(art(), "JPEG")
    comment = b"\xff\xfe\0\2"
    for count, is_taken in ((intake.MAX_FILL_BYTES, True), (intake.MAX_FILL_BYTES + pieces, False)):
        filled = data[:2] + (b"\xff" * (count // pieces) + comment) * pieces + data[2:]
        if is_taken:
            assert take_in(filled, **LIMITS).data == filled
        else:
            with pytest.raises(ValueError, match="fill bytes"):
                take_in(filled, **LIMITS)
    with pytest.raises(ValueError, match="cut short"):
        take_in(data[:2] + b"\xff" * 10, **LIMITS)
