"""Edits and variations of the procedural engine: what stays, what changes, and what hostile pictures come to."""

from __future__ import annotations

import io
import struct
import zlib
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from msgspec import structs
from PIL import Image, ImageDraw

from img_serving.domain.images import Call, ImageRequest, InputImage, Item, MediaType, Operation
from img_serving.engines.engine import GenerationCancelled, OnStep
from img_serving.engines.procedural import ProceduralEngine, paint, start_of

WIDE, HIGH = 96, 80


def saved(picture: Image.Image, kind: str = "PNG", **options: Any) -> InputImage:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    media: dict[str, MediaType] = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
    return InputImage(out.getvalue(), media[kind], *picture.size)


def portrait() -> Image.Image:
    """A light wall, a dark table, and something round and red between them."""
    picture = Image.new("RGB", (WIDE, HIGH), (205, 214, 220))
    draw = ImageDraw.Draw(picture)
    draw.rectangle([0, 60, WIDE, HIGH], fill=(120, 84, 60))
    draw.ellipse([30, 16, 66, 60], fill=(200, 50, 40))
    return picture


def hole(*, alpha: int = 0) -> Image.Image:
    """A mask that may be painted in its middle."""
    mask = Image.new("RGBA", (WIDE, HIGH), (0, 0, 0, 255))
    ImageDraw.Draw(mask).rectangle([24, 20, 71, 59], fill=(0, 0, 0, alpha))
    return mask


def call_of(
    *images: InputImage,
    prompt: str = "golden sunset over the sea",
    operation: Operation = "edit",
    mask: InputImage | None = None,
    seeds: tuple[int, ...] = (7,),
    size: tuple[int, int] = (WIDE, HIGH),
    previews: bool = False,
    **more: Any,
) -> Call:
    request = ImageRequest(prompt, operation=operation, images=images, mask=mask, **{"steps": 4, **more})
    items = tuple(Item(prompt, more.get("negative_prompt"), seed, images, mask) for seed in seeds)
    return Call(request, None, *size, items, timeout_seconds=10.0, previews=previews)


def files(*args: Any, **more: Any) -> list[bytes]:
    return ProceduralEngine().generate(call_of(*args, **more), OnStep())


def pixels(*args: Any, **more: Any) -> np.ndarray:
    (one,) = files(*args, **more)
    return np.asarray(Image.open(io.BytesIO(one)))


def vary(*images: InputImage, **more: Any) -> np.ndarray:
    return pixels(*images, **{"prompt": "", "operation": "variation", **more})


def apart(first: Any, second: Any) -> float:
    """The mean difference of two pictures, of 255."""
    return float(np.abs(np.asarray(first).astype(int) - np.asarray(second)).mean())


START = saved(portrait())
OTHER = saved(Image.new("RGB", (40, 40), (20, 220, 60)))
MASK = saved(hole())


# what is asked for


def test_strength_0_is_the_picture_and_strength_1_is_the_scene() -> None:
    assert np.array_equal(pixels(START, strength=0.0), np.asarray(portrait()))
    assert np.array_equal(vary(START, strength=0.0), np.asarray(portrait()))
    assert apart(pixels(START, strength=1.0), paint("golden sunset over the sea", None, 7, None, 4, WIDE, HIGH)) < 1


def test_the_stronger_the_farther_from_the_picture_and_the_nearer_to_the_scene() -> None:
    scene = paint("golden sunset over the sea", None, 7, None, 4, WIDE, HIGH)
    drawn = [pixels(START, strength=strength) for strength in (0.1, 0.3, 0.5, 0.75, 1.0)]
    away, near = [apart(one, portrait()) for one in drawn], [apart(one, scene) for one in drawn]
    assert away == sorted(away)
    assert near == sorted(near, reverse=True)
    for operation in ("edit", "variation"):
        moves = [apart(pixels(START, operation=operation, strength=s), portrait()) for s in (0.1, 0.4, 0.9)]
        assert all(before < after for before, after in pairwise(moves)), operation


def test_left_without_a_strength_three_quarters_may_change_and_half_in_a_variation() -> None:
    assert files(START) == files(START, strength=0.75)
    assert np.array_equal(vary(START), vary(START, strength=0.5))


def test_the_lines_of_a_picture_are_still_there_at_the_usual_strength() -> None:
    """What was light is on the whole still lighter than what was dark, wherever an edge ran between them."""
    before, after = np.asarray(portrait()).astype(int)[..., 1], pixels(START).astype(int)[..., 1]
    edges = np.abs(np.diff(before, axis=1)) > 60
    kept = np.sign(np.diff(before, axis=1)[edges]) == np.sign(np.diff(after, axis=1)[edges])
    assert kept.mean() > 0.9


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "purple nebula"},
        {"seeds": (8,)},
        {"negative_prompt": "sun"},
        {"guidance_scale": 2.0},
        {"steps": 12},
        {"strength": 0.4},
    ],
    ids=str,
)
def test_every_parameter_of_an_edit_changes_what_is_seen(change: dict[str, Any]) -> None:
    assert apart(pixels(START), pixels(START, **change)) > 0.5


def test_the_picture_has_the_size_that_is_asked_for() -> None:
    for size in ((64, 64), (160, 48), (16, 16)):
        assert pixels(START, size=size).shape == (size[1], size[0], 3)
        assert vary(START, size=size).shape == (size[1], size[0], 3)
    # stretched, and no part of it left out
    stretched = pixels(START, size=(WIDE // 2, HIGH), strength=0.0)
    assert apart(stretched, portrait().resize((WIDE // 2, HIGH), Image.Resampling.LANCZOS)) == 0


# masks


@pytest.mark.parametrize("operation", ["edit", "variation"])
@pytest.mark.parametrize("strength", [0.2, None, 1.0])
def test_what_the_mask_keeps_is_kept_to_the_last_bit(operation: Operation, strength: float | None) -> None:
    drawn = pixels(START, mask=MASK, operation=operation, strength=strength)
    painted = np.asarray(hole())[..., 3] == 0
    assert np.array_equal(drawn[~painted], np.asarray(portrait())[~painted])
    assert apart(drawn[painted], np.asarray(portrait())[painted]) > 3


def test_what_the_mask_keeps_is_kept_at_another_size_too() -> None:
    for size in ((WIDE * 2, HIGH * 2), (50, 37)):
        whole = np.asarray(portrait().resize(size, Image.Resampling.LANCZOS))
        keep = np.asarray(hole().resize(size, Image.Resampling.NEAREST))[..., 3] == 255
        assert np.array_equal(pixels(START, mask=MASK, size=size)[keep], whole[keep])


def test_under_a_mask_little_of_what_was_there_shines_through() -> None:
    inner = (slice(30, 50), slice(34, 62))
    scene = paint("golden sunset over the sea", None, 7, None, 4, WIDE, HIGH)
    assert apart(pixels(START, mask=MASK)[inner], scene[inner]) < 0.25 * apart(
        np.asarray(portrait())[inner], scene[inner]
    )


def test_a_half_transparent_mask_may_change_half() -> None:
    half = pixels(START, mask=saved(hole(alpha=128)), strength=1.0)
    inner = (slice(34, 46), slice(40, 56))
    whole = pixels(START, mask=MASK, strength=1.0)
    assert (
        0.3
        < apart(half[inner], np.asarray(portrait())[inner]) / apart(whole[inner], np.asarray(portrait())[inner])
        < 0.7
    )


def test_black_and_white_masks_are_painted_where_they_are_white() -> None:
    white = Image.new("L", (WIDE, HIGH), 0)
    ImageDraw.Draw(white).rectangle([24, 20, 71, 59], fill=255)
    assert files(START, mask=saved(white)) == files(START, mask=MASK)


def test_a_mask_that_keeps_everything_gives_the_picture_back() -> None:
    keeps = saved(Image.new("RGBA", (WIDE, HIGH), (0, 0, 0, 255)))
    assert np.array_equal(pixels(START, mask=keeps, strength=1.0), np.asarray(portrait()))


def test_a_thin_stroke_is_painted_too() -> None:
    stroke = Image.new("RGBA", (WIDE, HIGH), (0, 0, 0, 255))
    ImageDraw.Draw(stroke).line([0, 30, WIDE, 30], fill=(0, 0, 0, 0))
    drawn = pixels(START, mask=saved(stroke), strength=1.0)
    assert apart(drawn[30], np.asarray(portrait())[30]) > 5


def test_a_picture_that_is_transparent_somewhere_is_its_own_mask() -> None:
    """OpenAI's rule for edits without a mask."""
    own = portrait().convert("RGBA")
    own.putalpha(hole().getchannel("A"))
    keep = np.asarray(hole())[..., 3] == 255
    drawn = pixels(saved(own), strength=1.0)
    assert np.array_equal(drawn[keep], np.asarray(portrait())[keep])
    assert apart(drawn[~keep], 255) > 20, "and white, on which it was laid, is painted over"


# several pictures


@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_every_further_picture_is_seen(strength: float) -> None:
    def green(drawn: np.ndarray) -> float:
        red, middle, blue = (drawn[..., channel].astype(int) for channel in range(3))
        return float((middle > np.maximum(red, blue) + 25).mean())

    alone, with_one = pixels(START, strength=strength), pixels(START, OTHER, strength=strength)
    assert green(alone) < 0.01
    assert green(with_one) > 0.05
    assert green(with_one) < green(pixels(START, *[OTHER] * 4, strength=strength)) + 0.2


def test_the_order_of_pictures_matters_and_each_of_sixteen_counts() -> None:
    others = [saved(Image.new("RGB", (30, 30), (10 * i, 255 - 10 * i, 128))) for i in range(15)]
    full = files(START, *others)
    assert len({files(START, OTHER)[0], files(OTHER, START)[0]}) == 2
    for number in range(15):
        assert files(START, *(one for i, one in enumerate(others) if i != number)) != full


def test_further_pictures_stay_inside_the_mask() -> None:
    painted = np.asarray(hole())[..., 3] == 0
    drawn = pixels(START, OTHER, mask=MASK)
    assert np.array_equal(drawn[~painted], np.asarray(portrait())[~painted])
    assert drawn[painted][:, 1].max() > pixels(START, mask=MASK)[painted][:, 1].max() - 40
    assert files(START, OTHER, mask=MASK) != files(START, mask=MASK)


def test_further_pictures_change_nothing_where_nothing_may_change() -> None:
    assert np.array_equal(pixels(START, OTHER, strength=0.0), np.asarray(portrait()))


# variations


def test_variations_are_like_the_picture_and_differ_by_their_seed() -> None:
    drawn = [vary(START, seeds=(seed,)) for seed in range(6)]
    stranger = paint("forest", None, 1, None, 4, WIDE, HIGH)
    for number, one in enumerate(drawn):
        assert 2 < apart(one, portrait()) < 0.6 * apart(stranger, portrait())
        assert all(apart(one, other) > 1 for other in drawn[:number])


def test_a_variation_bends_things_and_does_not_only_turn_colours() -> None:
    """The edge of the table is straight in the picture, and no longer in its variations."""
    drawn = vary(START, seeds=(3,)).astype(int)[:, :, 1]
    edges = np.abs(np.diff(drawn[50:, :24], axis=0)).argmax(axis=0)
    assert edges.max() - edges.min() >= 1


# batches, and what is told


@pytest.mark.parametrize("operation", ["edit", "variation"])
def test_a_batch_is_its_pictures_alone_and_always_the_same(operation: Operation) -> None:
    together = files(START, operation=operation, seeds=(7, 8, 9))
    assert together == [files(START, operation=operation, seeds=(seed,))[0] for seed in (7, 8, 9)]
    assert len(set(together)) == 3


def test_items_of_different_requests_keep_their_own_pictures() -> None:
    first, second = call_of(START, seeds=(7,)), call_of(OTHER, seeds=(8,), prompt="forest", mask=None)
    both = structs.replace(first, items=(*first.items, *second.items, *first.items))
    drawn = ProceduralEngine().generate(both, OnStep())
    assert drawn[0] == drawn[2] == files(START)[0]
    assert drawn[1] == files(OTHER, prompt="forest", seeds=(8,))[0]


@pytest.mark.parametrize("operation", ["edit", "variation"])
def test_edits_are_shown_as_they_grow(operation: Operation) -> None:
    told: list[tuple[int, int]] = []
    shown: list[tuple[int, float | None, float]] = []

    def report(done: int, total: int, previews: Any) -> None:
        told.append((done, total))
        for one in previews:
            small = Image.open(io.BytesIO(one.data))
            shown.append((one.index, one.share, apart(small, portrait().resize(small.size))))

    call = call_of(START, operation=operation, seeds=(1, 2), previews=True)
    assert ProceduralEngine().generate(call, OnStep(report)) == files(START, operation=operation, seeds=(1, 2))
    assert told == [(done, 8) for done in range(1, 9)]
    assert [one[:2] for one in shown] == [(index, share / 4) for index in (0, 1) for share in range(1, 5)]
    changes = [one[2] for one in shown[:4]]
    assert changes == sorted(changes), "from the picture to what is made of it"


def test_previews_are_no_larger_than_what_is_drawn_nor_than_they_need_be() -> None:
    sizes: set[tuple[int, int]] = set()

    def report(_: int, __: int, previews: Any) -> None:
        sizes.update(Image.open(io.BytesIO(one.data)).size for one in previews)

    ProceduralEngine().generate(call_of(START, size=(512, 256), previews=True), OnStep(report))
    assert sizes == {(256, 128)}
    sizes.clear()
    ProceduralEngine().generate(call_of(START, previews=True), OnStep(report))
    assert sizes == {(WIDE, HIGH)}


@pytest.mark.parametrize("operation", ["edit", "variation"])
def test_a_cancelled_edit_stops(operation: Operation) -> None:
    asked = 0

    def is_cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 3

    with pytest.raises(GenerationCancelled):
        ProceduralEngine().generate(call_of(START, operation=operation, size=(128, 256)), OnStep(None, is_cancelled))
    assert asked == 3


# hostile pictures


def with_exif(orientation: int) -> InputImage:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(portrait().transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif)


def bomb(width: int, height: int) -> InputImage:
    """Some hundred bytes that claim to be a picture of any size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">II5B", width, height, 8, 2, 0, 0, 0))
    body = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return InputImage(body, "image/png", width, height)


def animated(kind: str) -> InputImage:
    frames = [Image.new("RGB", (WIDE, HIGH), (200 - 100 * i, 40, 40)) for i in range(3)]
    return saved(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


ODD = {
    "one pixel": saved(Image.new("RGB", (1, 1), (9, 9, 9))),
    "a line": saved(Image.new("RGB", (3000, 1), (9, 9, 9))),
    "grey": saved(portrait().convert("L")),
    "grey and alpha": saved(portrait().convert("LA")),
    "palette": saved(portrait().convert("P")),
    "bits": saved(portrait().convert("1")),
    "16 bits": saved(Image.new("I;16", (WIDE, HIGH), 32768)),
    "cmyk": saved(portrait().convert("CMYK"), "JPEG"),
    "webp": saved(portrait(), "WEBP"),
    "animated png": animated("PNG"),
    "animated webp": animated("WEBP"),
    "large": saved(Image.new("RGB", (5000, 4000), (90, 120, 200)), "JPEG"),
}


@pytest.mark.parametrize("operation", ["edit", "variation"])
@pytest.mark.parametrize("odd", ODD)
def test_any_picture_can_be_begun_with(odd: str, operation: Operation) -> None:
    drawn = pixels(ODD[odd], operation=operation)
    assert drawn.shape == (HIGH, WIDE, 3)
    if odd == "16 bits":
        assert abs(int(pixels(ODD[odd], strength=0.0)[0, 0, 0]) - 128) <= 1, "scaled, and not cut to white"
    if odd.startswith("animated"):
        assert pixels(ODD[odd], strength=0.0)[0, 0, 0] > 150, "the first frame"


def test_a_photograph_is_turned_upright() -> None:
    upright = start_of([with_exif(6)], None, WIDE, HIGH).ground
    assert apart(upright, portrait()) < 6


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (bomb(60_000, 60_000), "pixels|Bomb"),
        (bomb(6_000, 6_000), "pixels"),
        (bomb(64, 64), "decoded"),
        (InputImage(START.data[:200], "image/png", WIDE, HIGH), "decoded"),
        (InputImage(b"", "image/png", 1, 1), "decoded"),
        (InputImage(b"GIF89a" + bytes(40), "image/png", 1, 1), "decoded"),
        (InputImage(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/png", 9, 9), "decoded"),
    ],
)
@pytest.mark.parametrize("place", ["first", "further", "mask"])
def test_what_cannot_be_decoded_is_refused_in_words(picture: InputImage, words: str, place: str) -> None:
    given = {"first": ((picture,), None), "further": ((START, picture), None), "mask": ((START,), picture)}
    images, mask = given[place]
    with pytest.raises(ValueError, match=words):
        files(*images, mask=mask)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strength": 1.5}, "strength"),
        ({"strength": -0.1}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"size": (8, 64)}, "size"),
        ({"size": (4097, 64)}, "size"),
        ({"steps": 0}, "steps"),
        ({"seeds": (-1,)}, "seed"),
    ],
)
@pytest.mark.parametrize("operation", ["edit", "variation"])
def test_what_is_out_of_range_is_refused_by_name(change: dict[str, Any], words: str, operation: Operation) -> None:
    with pytest.raises(ValueError, match=words):
        files(START, operation=operation, **change)


def test_many_pictures_are_not_decoded_for_nobody() -> None:
    asked = 0

    def is_cancelled() -> bool:
        nonlocal asked
        asked += 1
        return asked == 4

    with pytest.raises(GenerationCancelled):
        ProceduralEngine().generate(call_of(START, *[OTHER] * 15), OnStep(None, is_cancelled))
    assert asked == 4


def test_an_edit_without_a_picture_is_refused() -> None:
    with pytest.raises(ValueError, match="a picture to start from"):
        files()


def test_the_built_in_backend_says_the_same_as_its_engine() -> None:
    from img_serving.backends.builtin import CAPABILITIES

    can = ProceduralEngine().capabilities()
    for name in ("operations", "honours", "honours_in_edits", "sizes", "max_images", "masks", "formats", "previews"):
        assert getattr(can, name) == getattr(CAPABILITIES, name), name
