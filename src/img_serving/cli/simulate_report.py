"""How `simulate` shows what it found: tables, plots of block characters, and the PNG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from img_serving.cli.charts import MOST_SERIES, Panel, Series, draw, save
from img_serving.cli.endings import printable
from img_serving.simulation import Report, SimulatedEndpoint, Status, percentile
from img_serving.simulation.report import Spread

_BLOCKS: Final = " ▁▂▃▄▅▆▇█"
_PLAIN: Final = " .:-=+*%#"
"""The same for terminals that have no block characters."""

_LEVELS: Final = ("WAIT\np50", "\np95", "\np99", "LATENCY\np50", "\np95", "\np99")

_MOST_ROWS: Final = 50
"""Rows of endpoints or tenants that a table shows."""


def show(console: Console, fleet: Sequence[SimulatedEndpoint], reports: Sequence[Report]) -> None:
    """All of it, for people: one run in depth, or several side by side."""
    ramp = _BLOCKS if (console.encoding or "").lower().startswith("utf") else _PLAIN
    parts: list[RenderableType] = [_latencies(reports), Text(), _work(reports, console.width, ramp)]
    if len(reports) == 1:
        parts += [Text(), _endpoints(reports[0], fleet)]
        if len(reports[0].tenants) > 1:
            parts += [Text(), _tenants(reports[0])]
        parts += _plots(reports[0], min(100, console.width) - 12, ramp)
    console.print(Group(*parts))


def seconds(value: float) -> str:
    """0.25, 12.3, 245, 12,345; - where there is none."""
    if not math.isfinite(value):
        return "-"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def share(value: float) -> str:
    """Percent, with a decimal where it matters."""
    return "-" if not math.isfinite(value) else f"{value:.1%}" if value < 0.1 else f"{value:.0%}"


def _table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, title=title, title_justify="left"
    )
    table.title_style = "bold"
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _latencies(reports: Sequence[Report]) -> Table:
    """One row a strategy."""
    table = _table("Waits and latencies, in seconds", ("\nSTRATEGY",), _LEVELS)
    for report in reports:
        wait, latency = Spread.of(report.waits()), Spread.of(report.latencies())
        figures = (wait.p50, wait.p95, wait.p99, latency.p50, latency.p95, latency.p99)
        table.add_row(report.strategy, *(seconds(value) for value in figures))
    return table


def _work(reports: Sequence[Report], width: int, ramp: str) -> Table:
    """One row a strategy. Columns that would be empty everywhere are left out."""
    ends = (Status.FAILED, Status.EXPIRED, Status.REFUSED, Status.PENDING)
    unhappy = [one for one in ends if any(report.count(one) for report in reports)]
    names = {Status.PENDING: "UNRESOLVED"}
    batches = any(report.mean_batch > 1 for report in reports)
    fair = any(math.isfinite(report.fairness()) for report in reports)
    headings = ["MAKESPAN", "IMAGES/S", "BUSY"]
    headings += ["BATCH"] * batches + ["FAIRNESS"] * fair + [names.get(one, one.name) for one in unhappy]
    table = _table("Work", ("STRATEGY",), headings)
    room = width - sum(len(heading) + 2 for heading in (*headings, max((one.strategy for one in reports), key=len)))
    columns = min(24, room) if len(reports) > 1 and room >= 10 else 0
    if columns:
        table.add_column("QUEUE OVER TIME"[:columns], no_wrap=True)
    deepest = max((max(report.samples.waiting, default=0) for report in reports), default=0)
    longest = max((report.last_second for report in reports if report.samples.times), default=0.0)
    for report in reports:
        row = [report.strategy, seconds(report.makespan), seconds(report.throughput), share(report.utilisation)]
        if batches:
            row.append(f"{report.mean_batch:.2f}")
        if fair:
            row.append(f"{report.fairness():.3f}" if math.isfinite(report.fairness()) else "-")
        row += [f"{report.count(one):,}" for one in unhappy]
        if columns:
            row.append(area(queue_depth(report, columns, longest), 1, deepest, ramp)[0])
        table.add_row(*row)
    return table


def _endpoints(report: Report, fleet: Sequence[SimulatedEndpoint]) -> Table:
    loads = any(one.model_loads for one in report.endpoints)
    table = _table(
        "Endpoints",
        ("ENDPOINT",),
        ("SPEED", "SLOTS", "BUSY", "CALLS", "IMAGES", "FAILED CALLS", *(["MODEL LOADS"] if loads else [])),
    )
    for figures, endpoint in list(zip(report.endpoints, fleet, strict=True))[:_MOST_ROWS]:
        row: list[RenderableType] = [
            Text(printable(figures.name)),
            f"{endpoint.speed:g}",
            str(figures.slots),
            share(figures.utilisation(report.makespan)),
            f"{figures.calls:,}",
            f"{figures.images:,}",
            f"{figures.failures:,}",
        ]
        table.add_row(*row, *([f"{figures.model_loads:,}"] if loads else []))
    if len(fleet) > _MOST_ROWS:
        table.add_row(f"… and {len(fleet) - _MOST_ROWS} more (--json has them all)")
    return table


def _tenants(report: Report) -> Table:
    table = _table("Tenants, in seconds", ("\nTENANT",), ["\nWEIGHT", "\nJOBS", *_LEVELS])
    for place, name in list(enumerate(report.tenants))[:_MOST_ROWS]:
        wait, latency = Spread.of(report.waits(place)), Spread.of(report.latencies(place))
        figures = (wait.p50, wait.p95, wait.p99, latency.p50, latency.p95, latency.p99)
        table.add_row(
            Text(printable(name)),
            f"{report.weights[place]:g}",
            f"{report.tenant.count(place):,}",
            *(seconds(value) for value in figures),
        )
    if len(report.tenants) > _MOST_ROWS:
        table.add_row(f"… and {len(report.tenants) - _MOST_ROWS} more (--json has them all)")
    return table


# --------------------------------------------------------------------------------------------------- block characters


def area(values: Sequence[float], height: int, most: float, ramp: str = _BLOCKS) -> list[str]:
    """Values from 0 to `most` as columns of block characters, `height` lines, the highest first."""
    steps = len(ramp) - 1
    levels = [
        min(height * steps, max(0, math.ceil(value / most * height * steps))) if most > 0 else 0 for value in values
    ]
    return [
        "".join(ramp[min(steps, max(0, level - row * steps))] for level in levels) for row in range(height - 1, -1, -1)
    ]


def queue_depth(report: Report, columns: int, longest: float) -> list[float]:
    """The most tasks that waited in each of so many equal stretches of time from 0 to `longest`."""
    depth = [0.0] * columns
    level, reached = 0.0, 0
    for at, waiting in zip(report.samples.times, report.samples.waiting, strict=True):
        column = min(columns - 1, int(at / longest * columns)) if longest > 0 else 0
        for between in range(reached, column):
            depth[between] = max(depth[between], level)
        reached, level = column, float(waiting)
        depth[column] = max(depth[column], level)
    return depth


def _plots(report: Report, columns: int, ramp: str) -> list[RenderableType]:
    """The queue over time and the distribution of the latency."""
    columns = max(20, min(88, columns))
    parts: list[RenderableType] = []
    depth = queue_depth(report, columns, report.last_second)
    if any(depth):
        parts += _framed("Queue: waiting tasks over time", depth, max(depth), f"{max(depth):,.0f}", ramp)
        parts.append(_scale(columns, "0 s", f"{seconds(report.last_second)} s"))
    ordered = sorted(report.latencies())
    if len(ordered) > 1:
        most = percentile(ordered, 0.99)
        counts = [0.0] * columns
        for value in ordered:
            if value <= most and most > 0:
                counts[min(columns - 1, int(value / most * columns))] += 1
        parts += _framed("Latency: how many jobs took how long", counts, max(counts), f"{max(counts):,.0f}", ramp)
        parts.append(_scale(columns, "0 s", f"{seconds(most)} s (p99)"))
    return parts


def _framed(title: str, values: Sequence[float], most: float, label: str, ramp: str) -> list[RenderableType]:
    lines = area(values, 6, most, ramp)
    shown: list[RenderableType] = [Text(f"\n{title}", "bold")]
    for place, line in enumerate(lines):
        shown.append(
            Text.assemble((f"{label if place == 0 else '0' if place == len(lines) - 1 else '':>8} ", "dim"), line)
        )
    return shown


def _scale(columns: int, left: str, right: str) -> Text:
    return Text(f"{'':9}{left}{right:>{max(1, columns - len(left))}}", "dim")


# ----------------------------------------------------------------------------------------------------------------- PNG


def plot(path: Path, subtitle: str, reports: Sequence[Report]) -> None:
    """The distribution of the latency and the queue over time, a line a strategy.

    Raises:
        OSError: it cannot be written.
    """
    shown = reports[:MOST_SERIES]
    latencies = [_distribution(report) for report in shown]
    depths = [_mean_depth(report) for report in shown if report.samples.times]
    wide = [one for one in latencies if one.xs]
    spread = max((one.xs[-1] / max(one.xs[0], 1e-9) for one in wide), default=1.0)
    panels = [
        Panel(
            "Latency: share of jobs done within",
            "seconds" + (", logarithmic" if spread > 100 else ""),
            "",
            latencies,
            log_x=spread > 100,
            percent_y=True,
        ),
        Panel("Queue: mean of the tasks that wait", "seconds", "", depths),
    ]
    save(draw("img-serving simulate", subtitle, panels), path)


def _mean_depth(report: Report) -> Series:
    """The mean of what waited in each of a hundred stretches of time: single steps of several strategies hide each other."""
    columns = 100
    stretch = max(report.last_second, 1e-9) / columns
    totals = [0.0] * columns
    times, waiting = report.samples.times, report.samples.waiting
    for at, until, depth in zip(times, (*times[1:], report.last_second), waiting, strict=True):
        while depth and at < until:
            column = min(columns - 1, int(at / stretch))
            end = until if column == columns - 1 else min(until, max((column + 1) * stretch, at + stretch * 1e-6))
            totals[column] += depth * (end - at)
            at = end  # noqa: PLW2901 - it walks on through the stretches
    middles = [(column + 0.5) * stretch for column in range(columns)]
    return Series(report.strategy, middles, [total / stretch for total in totals], dashed=_is_early(report))


def _is_early(report: Report) -> bool:
    return not report.samples.times


def _distribution(report: Report) -> Series:
    """The latency at a few hundred shares."""
    ordered = sorted(report.latencies())
    shares = [place / 400 for place in range(401)] if ordered else []
    return Series(report.strategy, [percentile(ordered, level) for level in shares], shares, dashed=_is_early(report))
