"""The procedural painter: what every input does to the picture, what stays the same, and how the engine reports."""

import os
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from img_serving.domain.capabilities import SizeRule
from img_serving.domain.images import SEED_LIMIT, Call, ImageRequest, Item
from img_serving.engines.engine import Engine, GenerationCancelled, OnStep, load_fully
from img_serving.engines.procedural import ProceduralEngine, compose, paint
from img_serving.engines.procedural.words import senses
from img_serving.media.png import encode_png, read_header

SIDE = 96
ENGLISH = "a red boat on a calm lake at sunset"
KOREAN = "노을 지는 바다 위의 작은 배"


def draw(prompt: str = ENGLISH, **change: Any) -> np.ndarray:
    given: dict[str, Any] = {"negative_prompt": None, "seed": 7, "guidance": None, "steps": 20}
    given |= {"width": SIDE, "height": SIDE} | change
    return paint(prompt, **given)


def changed(first: np.ndarray, second: np.ndarray, by: int = 8) -> float:
    """The share of pixels that differ by more than `by` of 255 in some channel: what an eye would see."""
    return float((np.abs(first.astype(int) - second).max(axis=2) > by).mean())


def share_of(pixels: np.ndarray, is_it: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]) -> float:
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return float(is_it(red, green, blue).mean())


def reddish(pixels: np.ndarray) -> float:
    return share_of(pixels, lambda red, green, blue: red > np.maximum(green, blue) + 40)


def bluish(pixels: np.ndarray) -> float:
    return share_of(pixels, lambda red, green, blue: blue > np.maximum(red, green) + 25)


def greenish(pixels: np.ndarray) -> float:
    return share_of(pixels, lambda red, green, blue: green > np.maximum(red, blue) + 15)


@pytest.mark.parametrize("prompt", [ENGLISH, KOREAN, "zxqv wub", ""])
@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8},
        {"negative_prompt": "blurry"},
        {"negative_prompt": "흐릿한"},
        {"guidance": 3.0},
        {"guidance": 14.0},
        {"steps": 10},
        {"steps": 40},
    ],
    ids=str,
)
def test_every_parameter_changes_what_is_seen(prompt: str, change: dict[str, Any]) -> None:
    assert changed(draw(prompt), draw(prompt, **change), by=2) >= 0.05


@pytest.mark.parametrize("prompt", [ENGLISH, KOREAN, "a quick brown fox jumps"])
def test_every_word_of_a_prompt_changes_what_is_seen(prompt: str) -> None:
    words = prompt.split()
    before = draw(prompt)
    for number in range(len(words)):
        other = " ".join("고래" if i == number else word for i, word in enumerate(words))
        assert changed(before, draw(other)) >= 0.05, other


def test_the_order_of_words_matters() -> None:
    assert changed(draw("blue sea under a red sky"), draw("red sea under a blue sky")) >= 0.05


def test_composed_and_decomposed_text_give_the_same_picture() -> None:
    for text in (KOREAN, "café au bord de l'océan"):
        composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert composed != decomposed
        pictures = [draw(one, negative_prompt=f"x {one}") for one in (composed, decomposed)]
        assert np.array_equal(pictures[0], pictures[1])


def test_letter_case_and_spaces_do_not_matter() -> None:
    assert np.array_equal(draw("Red  Sea\n"), draw("red sea"))


def test_defaults_are_what_the_signature_says() -> None:
    assert np.array_equal(draw(guidance=None, steps=None), draw(guidance=7.0, steps=20))
    assert np.array_equal(draw(negative_prompt=""), draw(negative_prompt=None))


@pytest.mark.parametrize(
    ("english", "korean"),
    [
        ("night sea", "밤바다"),
        ("red flower", "빨간 꽃"),
        ("blue mountain", "파란 산"),
        ("city", "도시의"),
        ("stars in space", "우주의 별"),
        ("watercolor forest", "수채화 숲"),
        ("sunset", "노을"),
        ("aurora", "오로라가"),
    ],
)
def test_english_and_korean_words_mean_the_same(english: str, korean: str) -> None:
    first, second = compose(english, None, 7, 7.0), compose(korean, None, 7, 7.0)
    for aspect in ("aurora", "styles"):
        assert getattr(first, aspect) == getattr(second, aspect)
    if english not in {"sunset", "aurora"}:  # these name no place: then the text itself chooses one
        assert first.places == second.places
    if first.time != second.time:
        assert not {"night", "sunset"} & set(english.split())


@pytest.mark.parametrize(
    ("english", "korean", "places"),
    [
        ("lighthouse", "등대", {"sea"}),
        ("boat", "배", {"sea"}),
        ("island", "섬", {"sea"}),
        ("beach", "해변", {"sea"}),
        ("river", "강", {"lake"}),
        ("bridge", "다리", {"lake", "hills"}),
        ("castle", "성", {"mountain", "forest"}),
        ("tower", "탑", {"city"}),
        ("house", "집", {"hills"}),
        ("tree", "나무", {"forest"}),
        ("garden", "정원", {"flower"}),
        ("cat", "고양이", {"flower"}),
        ("dog", "강아지", {"flower"}),
        ("fox", "여우", {"forest"}),
    ],
)
def test_a_thing_alone_stands_where_it_belongs(english: str, korean: str, places: set[str]) -> None:
    for word in (english, korean, f"{english} at dusk", f"황혼의 {korean}"):
        scene = compose(word, None, 7, 7.0)
        assert scene.places == places, word
        assert scene.lighthouse is (english == "lighthouse")
        assert scene.time == "dusk" or word in {english, korean}


def test_a_thing_stays_where_words_put_it() -> None:
    for prompt in ("a boat on a lake", "호수 위의 배"):
        assert compose(prompt, None, 7, 7.0).places == {"lake"}
    assert compose("a castle in the desert", None, 7, 7.0).places == {"desert"}
    assert "sea" not in compose("a boat", "sea", 7, 7.0).places


@pytest.mark.parametrize(("english", "korean", "aspect"), [("rain", "비", "clouds"), ("fog", "안개", "mist")])
def test_weather_words_mean_the_same(english: str, korean: str, aspect: str) -> None:
    assert all(getattr(compose(word, None, 7, 7.0), aspect) >= 0.95 for word in (english, korean))


def test_words_without_a_place_are_painted_as_a_landscape() -> None:
    for prompt in ("teapot", "a wooden chair", "찻주전자", "justice", "zxqv"):
        for seed in range(5):
            assert "abstract" not in compose(prompt, None, seed, 7.0).places
    for prompt in ("abstract", "추상", "a pattern"):
        assert compose(prompt, None, 7, 7.0).place == "abstract"


@pytest.mark.parametrize("prompt", ["a lighthouse at dusk", "노을 지는 등대"])
def test_a_lighthouse_stands_aside(prompt: str) -> None:
    """Its dark rock is on the side away from the sun, and it is the same at every size."""
    for seed in range(4):
        scene = compose(prompt, None, seed, 7.0)
        small, large = draw(prompt, seed=seed).astype(int), draw(prompt, seed=seed, width=192, height=192).astype(int)
        without = draw(prompt, negative_prompt="lighthouse", seed=seed, width=192, height=192)
        dark = large.max(axis=2)[-20:] < 90
        sides = (dark[:, :96].mean(), dark[:, 96:].mean())
        assert (sides[0] > sides[1]) == (scene.light[0] > 0)  # the rock is where the sun is not
        assert changed(large.astype(np.uint8), without) > 0.15
        assert np.abs(small - large.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3))).mean() < 12


@pytest.mark.parametrize("word", ["달리는", "강력한", "배경", "산책", "눈물", "category", "sung"])
def test_a_word_that_only_begins_like_a_known_one_is_unknown(word: str) -> None:
    assert senses(unicodedata.normalize("NFC", word)) == ()


@pytest.mark.parametrize(
    ("first", "second", "colour"),
    [
        ("red sky over hills", "blue sky over hills", reddish),
        ("빨간 하늘과 언덕", "파란 하늘과 언덕", reddish),
        ("blue abstract", "red abstract", bluish),
        ("green hills at noon", "red hills at noon", greenish),
        ("초록 언덕, 한낮", "빨간 언덕, 한낮", greenish),
    ],
)
def test_colour_words_colour_the_picture(first: str, second: str, colour: Callable[[np.ndarray], float]) -> None:
    assert colour(draw(first)) > 0.1 + colour(draw(second))


def test_a_colour_before_a_thing_colours_that_thing() -> None:
    picture = draw("red mountains under a blue sky, noon, clear")
    assert bluish(picture[: SIDE // 6]) > 0.4
    assert reddish(picture[-SIDE // 4 :]) > 0.6


def test_day_is_brighter_than_night() -> None:
    for day, night in (("sea at noon", "sea at night"), ("한낮의 바다", "한밤의 바다")):
        assert draw(day).mean() > draw(night).mean() + 50


def test_a_negative_colour_goes_away() -> None:
    for prompt, negative in (("red sunset over the sea", "red"), ("빨간 노을 바다", "빨간색")):
        before, after = draw(prompt, guidance=9.0), draw(prompt, guidance=9.0, negative_prompt=negative)
        assert reddish(before) > 0.2
        assert reddish(after) < 0.01


def test_negative_stars_go_away() -> None:
    prompt = "desert under a starry night sky"
    assert compose(prompt, None, 7, 7.0).stars == 1.0
    for negative in ("stars", "별"):
        assert compose(prompt, negative, 7, 7.0).stars == 0.0
    before, after = (draw(prompt, negative_prompt=one, width=192, height=192)[:60] for one in ("moon", "moon stars"))

    def sparkle(sky: np.ndarray) -> float:
        return float((np.abs(np.diff(sky.astype(int), axis=1)).max(axis=2) > 40).mean())

    assert sparkle(before) > 0.01 > sparkle(after)


def test_a_negative_place_is_not_drawn() -> None:
    scene = compose("mountain lake", "lake", 7, 7.0)
    assert scene.places == {"mountain"}
    for seed in range(20):
        assert "sea" not in compose("anything", "sea", seed, 7.0).places


def test_more_guidance_is_more_colour() -> None:
    def saturation(guidance: float) -> float:
        pixels = draw("red sky over blue hills", guidance=guidance).astype(int)
        return float((pixels.max(axis=2) - pixels.min(axis=2)).mean())

    values = [saturation(guidance) for guidance in (0.0, 2.0, 7.0, 20.0)]
    assert values == sorted(values)
    assert values[3] > values[0] + 40


def test_steps_come_closer_and_closer() -> None:
    """Each doubling of the steps changes less than the one before: they refine."""
    pictures = [draw(steps=steps).astype(int) for steps in (1, 4, 16, 64)]
    moves = [np.abs(first - second).mean() for first, second in pairwise(pictures)]
    assert moves == sorted(moves, reverse=True)


def test_the_scene_is_the_same_at_every_size() -> None:
    small, large = draw(width=64, height=64).astype(float), draw(width=256, height=256).astype(float)
    shrunk = large.reshape(64, 4, 64, 4, 3).mean(axis=(1, 3))
    elsewhere = draw(width=64, height=64, seed=8).astype(float)
    assert np.abs(small - shrunk).mean() < 12
    assert np.abs(small - shrunk).mean() < 0.6 * np.abs(small - elsewhere).mean()


@pytest.mark.parametrize("size", [(16, 16), (16, 300), (300, 16), (97, 61), (4096, 16), (16, 4096)])
@pytest.mark.parametrize(
    "prompt",
    [
        "neon city at night by the sea with fireflies",
        "watercolor flower meadow in snow",
        "saturn in space",
        "abstract",
        "aurora over a mountain lake, forest, moon",
        "minimal desert beach",
        "lighthouse at dusk",
    ],
)
def test_every_size_can_be_drawn(prompt: str, size: tuple[int, int]) -> None:
    pixels = paint(prompt, None, 1, None, 2, *size)
    assert pixels.shape == (size[1], size[0], 3)
    assert pixels.dtype == np.uint8
    assert pixels.std() > 3


@settings(max_examples=40, deadline=None)
@given(
    prompt=st.text(st.characters(), max_size=40),
    negative=st.none() | st.text(st.characters(), max_size=20),
    seed=st.integers(0, SEED_LIMIT - 1),
    guidance=st.none() | st.floats(0, 100),
    steps=st.integers(1, 4),
)
def test_any_text_can_be_drawn_and_always_the_same(
    prompt: str, negative: str | None, seed: int, guidance: float | None, steps: int
) -> None:
    first, second = (paint(prompt, negative, seed, guidance, steps, 24, 16) for _ in range(2))
    assert np.array_equal(first, second)


def test_lone_surrogates_are_only_text() -> None:
    assert draw("\ud800 red", width=16, height=16).shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"width": 15}, "size"),
        ({"height": 4097}, "size"),
        ({"width": 4096, "height": 1025}, "size"),
        ({"seed": -1}, "seed"),
        ({"seed": SEED_LIMIT}, "seed"),
        ({"guidance": -0.1}, "guidance"),
        ({"guidance": float("nan")}, "guidance"),
        ({"steps": 0}, "steps"),
        ({"steps": 1001}, "steps"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        draw(**change)


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_another_process_draws_the_same_bytes(hash_seed: str) -> None:
    """Whatever its string hashes are: several unwanted hues once were taken in the order of a set."""
    negative = "purple cyan yellow 초록"
    program = (
        "from img_serving.engines.procedural import paint; from hashlib import sha256;"
        f"print(sha256(paint({KOREAN!r}, {negative!r}, 5, 6.5, 7, 80, 48).tobytes()).hexdigest())"
    )
    from hashlib import sha256

    here = sha256(paint(KOREAN, negative, 5, 6.5, 7, 80, 48).tobytes()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.split() == [here]


def test_threads_do_not_disturb_each_other() -> None:
    alone = [draw(seed=seed) for seed in range(4)]
    together: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda seed=seed: together.update({seed: draw(seed=seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone[seed], together[seed]) for seed in range(4))


def test_every_step_is_reported_and_shown() -> None:
    steps: list[tuple[int, int]] = []
    shown: list[tuple[int, tuple[int, ...]]] = []
    pixels = draw(
        steps=5,
        width=256,
        height=128,
        on_step=lambda done, total: steps.append((done, total)),
        preview=lambda done, small: shown.append((done, small.shape)),
    )
    assert steps == [(done, 5) for done in range(1, 6)]
    assert shown == [(done, (128, 256, 3)) for done in range(1, 6)]
    assert np.array_equal(pixels, draw(steps=5, width=256, height=128)), "to be watched changes nothing"


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_cancelled_picture_stops_at_the_next_step(after: int) -> None:
    done: list[int] = []
    with pytest.raises(GenerationCancelled):
        draw(on_step=lambda step, _: done.append(step), is_cancelled=lambda: len(done) >= after)
    assert done == list(range(1, after + 1))


@pytest.mark.parametrize("prompt", [ENGLISH, "abstract", "purple nebula", "flower meadow in snow with fireflies"])
def test_a_cancelled_picture_stops_while_it_is_drawn(prompt: str) -> None:
    asked = 0

    def draw_until(stop: int | None) -> None:
        nonlocal asked
        asked = 0

        def is_cancelled() -> bool:
            nonlocal asked
            asked += 1
            return asked == stop

        draw(prompt, steps=1, width=256, height=512, is_cancelled=is_cancelled)

    draw_until(None)
    often = asked
    assert often >= 7, "before the step, before the picture, after its backdrop and before each band"
    for stop in {1, 2, 3, 4, often // 2, often - 1, often}:
        with pytest.raises(GenerationCancelled):
            draw_until(stop)
        assert asked == stop


# ── the engine ──


def call(*items: Item, steps: int | None = 3, guidance: float | None = None, size: tuple[int, int] = (48, 32)) -> Call:
    request = ImageRequest(prompt=items[0].prompt, steps=steps, guidance_scale=guidance)
    return Call(request, None, *size, items=items, timeout_seconds=10.0)


ITEMS = (Item("붉은 산", None, 1), Item("blue sea", "stars", SEED_LIMIT - 1), Item("붉은 산", None, 2))


def test_a_batch_is_its_pictures_alone() -> None:
    engine: Engine = ProceduralEngine()
    load_fully(engine)
    together = [one for one in engine.generate(call(*ITEMS), OnStep()) if isinstance(one, bytes)]
    assert together == [engine.generate(call(item), OnStep())[0] for item in ITEMS]
    assert len(set(together)) == 3
    assert {read_header(data) for data in together} == {(48, 32)}


def test_the_engine_writes_what_the_painter_draws() -> None:
    (data,) = ProceduralEngine().generate(call(ITEMS[1], guidance=4.0), OnStep())
    assert data == encode_png(paint("blue sea", "stars", SEED_LIMIT - 1, 4.0, 3, 48, 32))


def test_progress_counts_through_the_batch() -> None:
    steps: list[tuple[int, int]] = []
    ProceduralEngine().generate(call(*ITEMS), OnStep(lambda done, total, _: steps.append((done, total))))
    assert steps == [(done, 9) for done in range(1, 10)]


def test_a_cancelled_batch_stops_at_the_next_step() -> None:
    done: list[int] = []
    on_step = OnStep(lambda step, *_: done.append(step), lambda: len(done) >= 4)
    with pytest.raises(GenerationCancelled):
        ProceduralEngine().generate(call(*ITEMS), on_step)
    assert done == [1, 2, 3, 4]


def test_a_batch_shows_each_picture_as_it_grows() -> None:
    shown: list[tuple[int, int, float | None]] = []
    watched = structs.replace(call(*ITEMS), previews=True)
    on_step = OnStep(lambda done, _, previews: shown.extend((done, one.index, one.share) for one in previews))
    assert ProceduralEngine().generate(watched, on_step) == ProceduralEngine().generate(call(*ITEMS), OnStep())
    assert shown == [(done, (done - 1) // 3, ((done - 1) % 3 + 1) / 3) for done in range(1, 10)]


@pytest.mark.parametrize(("quality", "steps"), [("low", 8), ("medium", 20), ("high", 40)])
def test_quality_is_a_number_of_steps_where_none_is_said(quality: str, steps: int) -> None:
    asked = call(ITEMS[0], steps=None)
    asked = structs.replace(asked, request=structs.replace(asked.request, quality=quality))
    totals: set[int] = set()
    ProceduralEngine().generate(asked, OnStep(lambda _, total, __: totals.add(total)))
    assert totals == {steps}


def test_the_engine_says_what_it_can() -> None:
    can = ProceduralEngine().capabilities()
    assert can.batch == "items"
    assert can.progress
    assert can.honours == {"negative_prompt", "seed", "num_inference_steps", "guidance_scale", "size", "quality"}
    assert can.sizes == SizeRule(min_side=16, max_side=4096, max_pixels=2048 * 2048)
