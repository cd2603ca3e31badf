"""Charts: round ticks, fitting axes, and pictures in which the lines really are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from img_serving.cli.charts import COLOURS, MOST_SERIES, Panel, Series, draw, drawable, label_of, log_ticks, save, ticks

steady = settings(deadline=None, derandomize=True)


def colours_in(image: Image.Image) -> set[str]:
    counted = image.getcolors(1 << 24) or []
    return {"#" + "".join(f"{part:02X}" for part in colour) for _, colour in counted if isinstance(colour, tuple)}


@pytest.mark.parametrize(
    ("least", "most", "expected"),
    [(0, 10, [0, 2, 4, 6, 8, 10]), (0, 0.5, [0, 0.1, 0.2, 0.3, 0.4, 0.5]), (90, 100, [90, 92, 94, 96, 98, 100])],
)
def test_ticks_are_round(least: float, most: float, expected: list[float]) -> None:
    assert ticks(least, most) == pytest.approx(expected)


@steady
@given(st.floats(0, 1e9), st.floats(1e-6, 1e9))
def test_there_are_a_handful_of_ticks_within_the_range(least: float, span: float) -> None:
    found = ticks(least, least + span)
    assert len(found) <= 8
    assert all(least - span * 1e-6 <= value <= least + span * (1 + 1e-6) for value in found)


def test_a_range_of_nothing_has_one_tick() -> None:
    assert ticks(3, 3) == [3]
    assert ticks(0, float("inf")) == [0]


def test_logarithmic_ticks_have_every_digit_only_where_there_is_room() -> None:
    assert log_ticks(1, 100) == [1, 2, 5, 10, 20, 50, 100]
    assert log_ticks(1, 1e9) == [10.0**power for power in range(10)]


def test_labels_are_short() -> None:
    assert [label_of(value) for value in (0, 0.25, 12, 1500, 1.5e5, 1.5e6)] == [
        "0",
        "0.25",
        "12",
        "1,500",
        "150k",
        "1.5M",
    ]


def test_letters_that_the_font_does_not_have_are_shown_as_such() -> None:
    assert drawable("a ÷ 여우…") == "a ? ??…"


def test_every_line_is_drawn_in_a_colour_of_its_own() -> None:
    series = [Series(f"s{place}", [0, 10], [place, place]) for place in range(MOST_SERIES)]
    image = draw("title", "subtitle", [Panel("panel", "x", "y", series)])
    assert image.width == 620
    assert set(COLOURS) <= colours_in(image)


def test_panels_stand_side_by_side_and_a_long_legend_takes_more_rows() -> None:
    few = draw("t", "s", [Panel("p", "x", "y", [Series("a", [0, 1], [0, 1])])] * 2)
    long = [Series("a rather long name of a line " * 3 + str(place), [0, 1], [0, 1]) for place in range(4)]
    many = draw("t", "s", [Panel("p", "x", "y", long)] * 2)
    assert few.width == many.width == 1240
    assert many.height > few.height


def test_bars_that_are_too_high_are_cut() -> None:
    bars = [Series("a", (), [1.0, 50.0]), Series("b", (), [2.0, float("nan")])]
    image = draw("t", "s", [Panel("p", "x", "y", bars, ("one", "two"), y_most=3.0, target=1.0)])
    assert set(COLOURS[:2]) <= colours_in(image)


@pytest.mark.parametrize(
    "series",
    [
        [],
        [Series("a", [], [])],
        [Series("a", [1], [1])],
        [Series("a", [0, 0], [0, 0])],
        [Series("a", [1, 2], [5, 1e9])],
    ],
)
def test_little_or_odd_data_is_still_a_picture(series: list[Series]) -> None:
    for log_x in (False, True):
        assert draw("t" * 500, "s" * 5000, [Panel("p", "x", "y", series, log_x=log_x)]).height > 300


def test_many_points_keep_their_peaks() -> None:
    ys = [0.0] * 100_000
    ys[50_000] = 1.0
    image = draw("t", "s", [Panel("p", "x", "y", [Series("a", range(100_000), ys)], y_most=1.0)])
    wanted = tuple(int(COLOURS[0][place : place + 2], 16) for place in (1, 3, 5))
    column = [y for y in range(150, 420) for x in range(325, 340) if _close(image.getpixel((x, y)), wanted)]
    assert max(column) - min(column) > 200


def _close(pixel: object, wanted: tuple[int, ...]) -> bool:
    assert isinstance(pixel, tuple)
    return all(abs(one - other) < 60 for one, other in zip(pixel, wanted, strict=True))


def test_a_picture_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    image = draw("t", "s", [Panel("p", "x", "y", [Series("a", [0, 1], [0, 1])])])
    save(image, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as written:
        assert written.size == image.size
    with pytest.raises(OSError, match="gone"):
        save(image, tmp_path / "gone" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
