"""Charts as PNG pictures: panels of lines or bars with axes, ticks and a legend, drawn with Pillow."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageFont import FreeTypeFont, ImageFont

COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#5F6770", "#8C564B", "#332288")
"""Told apart also by the colour-blind: most are Okabe and Ito's."""

MOST_SERIES: Final = len(COLOURS)

_ALSO: Final = "…’·"
_INK, _SOFT, _GRID, _PAPER = "#1F2430", "#5A6270", "#E4E7EC", "#FFFFFF"
_SCALE = 3
"""Drawn so many times as large, then made smaller: Pillow's lines have no smooth edges of their own."""
_LEGEND_ROW = 22
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 28, 36, 50


@dataclass(frozen=True, slots=True)
class Series:
    """One line (or one colour of bars): a name and its points. `step`: a value holds until the next; `dashed`: a reference."""

    name: str
    xs: Sequence[float]
    ys: Sequence[float]
    step: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes.

    With `groups` it has bars: each series gives one value a group in `ys`. Bars that are higher than `y_most` are cut there;
    every bar says its value. `target` is a dashed line across. `log_x` needs x values above zero; without it the axis begins
    at `x_least`.
    """

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    groups: Sequence[str] = ()
    y_most: float | None = None
    x_least: float = 0.0
    log_x: bool = False
    percent_y: bool = False
    target: float | None = None


def ticks(least: float, most: float, count: int = 5) -> list[float]:
    """About `count` round values from `least` to `most`: multiples of 1, 2 or 5 and a power of ten."""
    span = most - least
    if not (math.isfinite(span) and span > 0):
        return [least]
    rough = span / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(least / step - 1e-9)
    last = math.floor(most / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def log_ticks(least: float, most: float) -> list[float]:
    """1, 2 and 5 times the powers of ten in the range; only the powers where those would be too many."""
    powers = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    factors = (1, 2, 5) if len(powers) <= 5 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if least * 0.999 <= value <= most * 1.001]


def label_of(value: float) -> str:
    """A tick's text: 1500000 is 1.5M, 150000 is 150k, 1500 is 1,500, 0.25 is 0.25."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    if abs(value) >= 1e5:
        return f"{value / 1e3:g}k"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def drawable(text: str) -> str:
    """`text` as far as Pillow's own font has its letters, which are hardly more than those of ASCII."""
    return "".join(char if (char.isascii() and char.isprintable()) or char in _ALSO else "?" for char in text)


def save(image: Image, path: Path) -> None:
    """Write a PNG, whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        image.save(draft, "PNG", optimize=True)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def draw(title: str, subtitle: str, panels: Sequence[Panel], *, width: int = 620, height: int = 360) -> Image:
    """The panels side by side, each `width` x `height` pixels, under a title and one legend for all."""
    from PIL import Image

    sheet = _Sheet(len(panels) * width, height)
    top = sheet.head(title, subtitle, {one.name: one.dashed for panel in panels for one in panel.series})
    for place, panel in enumerate(panels):
        sheet.panel(panel, place * width, top, width, height)
    used = top + height
    whole = sheet.image.crop((0, 0, sheet.width * _SCALE, used * _SCALE))
    return whole.resize((sheet.width, used), Image.Resampling.BOX)


class _Sheet:
    """The enlarged picture; everything is given in final pixels."""

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw

        self.width = width
        # as high as it could be with every name in a row of its own; what the legend leaves is cut off
        self.height = height + 104 + MOST_SERIES * _LEGEND_ROW
        self.image = Image.new("RGB", (self.width * _SCALE, self.height * _SCALE), _PAPER)
        self.pen = ImageDraw.Draw(self.image)
        self._fonts: dict[int, FreeTypeFont | ImageFont] = {}
        self._colour_of: dict[str, str] = {}

    def head(self, title: str, subtitle: str, names: Mapping[str, bool]) -> int:
        """Title, subtitle and the legend: names, and whether their lines are dashed. Returns where the panels begin."""
        self.text(24, 18, title, 20, _INK, anchor="la")
        self.text(24, 46, self.fitting(subtitle, 13, self.width - 48), 13, _SOFT, anchor="la")
        x, y = 24.0, 84.0
        for place, (name, dashed) in enumerate(names.items()):
            self._colour_of[name] = COLOURS[place % len(COLOURS)]
            wide = 29 + self.text_width(name, 13)
            if x + wide > self.width - 24 and x > 24:
                x, y = 24.0, y + _LEGEND_ROW
            for start, end in _dashes([(x, y), (x + 22, y)], 9 if dashed else 22, 4):
                self.line([start, end], self._colour_of[name], 3)
            self.text(x + 29, y, name, 13, _INK, anchor="lm")
            x += wide + 24
        return round(y) + 20

    def panel(self, panel: Panel, x: int, y: int, width: int, height: int) -> None:
        top = _TOP + (18 if panel.groups else 0)  # the values of cut bars stand above them
        frame = _Frame(panel, x + _LEFT, y + top, width - _LEFT - _RIGHT, height - top - _BOTTOM)
        self.text(frame.x, y + 8, panel.title, 15, _INK, anchor="la")
        for value in frame.y_ticks():
            at = frame.y_of(value)
            self.line([(frame.x, at), (frame.x + frame.width, at)], _GRID, 1)
            self.text(frame.x - 8, at, f"{value:.0%}" if panel.percent_y else label_of(value), 12, _SOFT, anchor="rm")
        if panel.groups:
            self._bars(panel, frame)
        else:
            for value in frame.x_ticks():
                at = frame.x_of(value)
                self.line([(at, frame.bottom), (at, frame.bottom + 4)], _SOFT, 1)
                self.text(at, frame.bottom + 8, label_of(value), 12, _SOFT, anchor="ma")
            for series in panel.series:
                self._curve(series, frame)
        if panel.target is not None:
            at = frame.y_of(panel.target)
            for start, end in _dashes([(frame.x, at), (frame.x + frame.width, at)], 6, 4):
                self.line([start, end], _INK, 1.2)
        self.line([(frame.x, frame.bottom), (frame.x + frame.width, frame.bottom)], _SOFT, 1)
        self.text(frame.x + frame.width / 2, frame.bottom + 28, panel.x_label, 13, _SOFT, anchor="ma")
        self.text(frame.x + frame.width, y + 10, panel.y_label, 12, _SOFT, anchor="ra")

    def _curve(self, series: Series, frame: _Frame) -> None:
        points = list(frame.path(series))
        if len(points) < 2:
            return
        if series.dashed:
            for start, end in _dashes(points, 9, 6):
                self.line([start, end], self._colour_of[series.name], 2.2)
        else:
            self.line(points, self._colour_of[series.name], 2.2)

    def _bars(self, panel: Panel, frame: _Frame) -> None:
        each = frame.width / len(panel.groups)
        thick = min(46.0, each * 0.84 / len(panel.series))
        for place, group in enumerate(panel.groups):
            middle = frame.x + each * (place + 0.5)
            self.text(middle, frame.bottom + 8, group, 12, _SOFT, anchor="ma")
            left = middle - thick * len(panel.series) / 2
            for number, series in enumerate(panel.series):
                value = series.ys[place]
                if not math.isfinite(value):
                    continue
                x, top = left + number * thick, frame.y_of(min(value, frame.y_most))
                self.box(x + 1.5, top, x + thick - 1.5, frame.bottom, self._colour_of[series.name])
                text = f"{value:.2f}" if value < 10 else f"{value:,.0f}"
                if value > frame.y_most:
                    # a white stroke says that the bar goes on
                    self.line([(x - 1, top + 13), (x + thick + 1, top + 7)], _PAPER, 3)
                self.text(x + thick / 2, top - 3, text, 11, _INK, anchor="md")

    # the pen, in final pixels

    def text(self, x: float, y: float, text: str, size: int, colour: str, *, anchor: str) -> None:
        self.pen.text((x * _SCALE, y * _SCALE), drawable(text), fill=colour, font=self._font(size), anchor=anchor)

    def text_width(self, text: str, size: int) -> float:
        return self._font(size).getlength(drawable(text)) / _SCALE

    def fitting(self, text: str, size: int, width: float) -> str:
        """`text`, shortened to what fits."""
        text = text[:500]
        if self.text_width(text, size) <= width:
            return text
        while text and self.text_width(f"{text}…", size) > width:
            text = text[:-1]
        return f"{text}…"

    def line(self, points: Sequence[tuple[float, float]], colour: str, thick: float) -> None:
        scaled = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.pen.line(scaled, fill=colour, width=max(1, round(thick * _SCALE)), joint="curve")

    def box(self, left: float, top: float, right: float, bottom: float, colour: str) -> None:
        self.pen.rectangle((left * _SCALE, top * _SCALE, right * _SCALE, bottom * _SCALE), fill=colour)

    def _font(self, size: int) -> FreeTypeFont | ImageFont:
        if size not in self._fonts:
            from PIL import ImageFont

            self._fonts[size] = ImageFont.load_default(size * _SCALE)
        return self._fonts[size]


class _Frame:
    """Where the values of a panel lie on the sheet."""

    def __init__(self, panel: Panel, x: float, y: float, width: float, height: float) -> None:
        self.x, self.y, self.width, self.height = x, y, width, height
        self.bottom = y + height
        self._log = panel.log_x
        ys = [value for series in panel.series for value in series.ys if math.isfinite(value)]
        most = panel.y_most if panel.y_most is not None else max(ys, default=1.0)
        if panel.y_most is None and not panel.percent_y:
            most = max(most, panel.target or 0.0)
            marks = ticks(0.0, most)
            # the axis ends at the first tick that nothing goes beyond
            step = marks[1] if len(marks) > 1 else most or 1.0
            most = math.ceil(most / step - 1e-9) * step or 1.0
        self.y_most = 1.0 if panel.percent_y else most
        xs = [value for series in panel.series for value in series.xs if math.isfinite(value)]
        self.x_least = max(min(xs, default=0.0), 1e-9) if self._log else panel.x_least
        self.x_most = max(xs, default=1.0)
        if self.x_most <= self.x_least:
            self.x_most = self.x_least + 1.0

    def x_ticks(self) -> list[float]:
        return log_ticks(self.x_least, self.x_most) if self._log else ticks(self.x_least, self.x_most, 6)

    def y_ticks(self) -> list[float]:
        return ticks(0.0, self.y_most)

    def x_of(self, value: float) -> float:
        least, most = self.x_least, self.x_most
        if self._log:
            value, least, most = math.log(max(value, least)), math.log(least), math.log(most)
        return self.x + (value - least) / (most - least) * self.width

    def y_of(self, value: float) -> float:
        return self.bottom - min(max(value / self.y_most, 0.0), 1.0) * self.height

    def path(self, series: Series) -> Iterator[tuple[float, float]]:
        """The points on the sheet; of many that fall on one column, the first, the highest and the lowest."""
        last: tuple[float, float] | None = None
        column: list[float] = []
        for x_value, y_value in zip(series.xs, series.ys, strict=True):
            x, y = self.x_of(x_value), self.y_of(y_value)
            if last is not None and x - last[0] < 0.5:
                column.append(y)
                continue
            if last is not None and column:
                yield last[0], min(column)
                yield last[0], max(column)
                last = (last[0], column[-1])
                yield last
                column = []
            if series.step and last is not None:
                yield x, last[1]
            last = (x, y)
            yield last
        if last is not None and column:
            yield last[0], column[-1]


def _dashes(
    points: Sequence[tuple[float, float]], on: float, off: float
) -> Iterator[tuple[tuple[float, float], tuple[float, float]]]:
    """A path as dashes, each a straight piece."""
    left, drawing = on, True
    for (x, y), (to_x, to_y) in pairwise(points):
        length, done = math.hypot(to_x - x, to_y - y), 0.0
        while done < length:
            piece = min(left, length - done)
            start, end = done / length, (done + piece) / length
            if drawing:
                yield (
                    (x + (to_x - x) * start, y + (to_y - y) * start),
                    (x + (to_x - x) * end, y + (to_y - y) * end),
                )
            done += piece
            left -= piece
            if left <= 1e-9:
                drawing = not drawing
                left = on if drawing else off
