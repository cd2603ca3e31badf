"""How good the scheduler's decisions are, in virtual time and beside others', and what one costs.

It measures; it is no test: the exit status is 0 whatever the figures are, unless `--check` is given: then it is 1 when a
target is missed. docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from scheduling_cases import (
    BURST,
    DISPATCHERS,
    FIGURES,
    LOADS,
    TASKS,
    Batching,
    Check,
    Fairness,
    Flood,
    Unequal,
    batching,
    fairness,
    flood,
    unequal_endpoints,
)
from scheduling_cost import (
    COST_TARGETS,
    MILLION_TARGET,
    QUEUES,
    Costs,
    a_million,
    calibration,
    decision_costs,
)

from img_serving.cli.charts import Panel, Series, draw, save
from img_serving.simulation import percentile

OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Found:
    """Everything that was measured."""

    seeds: int
    unequal: Unequal
    batching: Sequence[Batching]
    floods: Sequence[Flood]
    fairness: Sequence[Fairness]
    costs: Sequence[Costs]
    calibration_ms: tuple[float, float]
    million_seconds: float | None

    def checks(self) -> list[Check]:
        checks = self.unequal.checks()
        for case in (*self.batching, *self.floods, *self.fairness, *self.costs):
            checks += case.checks()
        if self.million_seconds is not None:
            checks.append(Check("a million tasks, wall time", self.million_seconds, MILLION_TARGET, unit=" s"))
        return checks


def measure(options: argparse.Namespace, advance: Callable[[str], None]) -> Found:
    seeds = options.seeds
    few = max(1, seeds // 2)
    unequal = unequal_endpoints(seeds, advance)
    batches = [batching(count, few, advance) for count in (1, 4)]
    floods = [flood(count, few, advance) for count in (1, 4)]
    fair = [
        fairness((1, 1, 1, 1, 1), "five equal tenants", few, advance),
        fairness((1, 2, 4), "weights 1, 2, 4", few, advance),
    ]
    if options.virtual:
        return Found(seeds, unequal, batches, floods, fair, [], (0.0, 0.0), None)
    before = calibration()
    queues = QUEUES[:3] if options.quick else QUEUES
    costs = list(decision_costs(queues, *((3, 300) if options.quick else (7, 1000)), advance))
    after = calibration()
    million = None if options.quick else a_million(advance)
    return Found(seeds, unequal, batches, floods, fair, costs, (before, after), million)


# --------------------------------------------------------------------------------------------------------------- report


def table(title: str, left: str, *right: str) -> Table:
    made = Table(title=title, title_justify="left")
    made.add_column(left, no_wrap=True)
    for heading in right:
        made.add_column(heading, justify="right", no_wrap=True)
    return made


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:,.0f}"


def unequal_table(found: Unequal, seeds: int) -> Table:
    made = table(
        f"Unequal endpoints, {TASKS:,} tasks (burst: {BURST}), mean of {seeds} seeds: seconds (÷ reference)",
        "dispatcher",
        *(f"{load} {figure}" for load in LOADS for figure in FIGURES if figure != "makespan" or load == "burst"),
    )
    for name in DISPATCHERS:
        cells = []
        for load in LOADS:
            for figure in FIGURES:
                if figure == "makespan" and load != "burst":
                    continue
                ratio = found.ratio(load, name, figure)
                mean = seconds(found.mean(load, name, figure))
                cells.append(mean if name == "reference" else f"{mean} ({ratio:.2f})")
        made.add_row(name, *cells)
    return made


def batching_table(found: Sequence[Batching]) -> Table:
    loads = list(found[0].by_load)
    made = table(
        "Batches: a call of b pictures takes 2 + b seconds, at most 8; latency as mean seconds (without batches)",
        "endpoints",
        "throughput ÷ best",
        "calls",
        "images",
        *(f"at {load}" for load in loads),
    )
    for one in found:
        cells = [f"{seconds(by['batches'])} ({seconds(by['single'])})" for by in one.by_load.values()]
        made.add_row(str(one.endpoints), f"{one.throughput:.3f}", f"{one.calls:,}", f"{one.images:,}", *cells)
    return made


def tenants_table(floods: Sequence[Flood], fair: Sequence[Fairness]) -> Table:
    made = table("Tenants", "case", "figure", "value")
    for one in floods:
        what = f"1,000 images wait, {one.endpoints} endpoint(s), 1 s a picture"
        made.add_row(what, "the other's p95 wait, s (alone)", f"{one.beside_p95:.2f} ({one.alone_p95:.2f})")
    for case in fair:
        made.add_row(case.what, "Jain's index", f"{case.index:.4f}")
        for name, share in case.served.items():
            made.add_row("", name, f"{share:.1%}")
    return made


def cost_table(found: Found) -> Table:
    before, after = found.calibration_ms
    made = table(
        f"A decision in µs, median \\[min–max] of the rounds; a fixed loop takes {before:.0f} ms before, {after:.0f} ms after",
        "tasks that wait",
        *(f"{cost.queue:,}" for cost in found.costs[0].by_queue),
        "longest ÷ shortest",
        "submit, longest",
    )
    for costs in found.costs:
        cells = [
            f"{cost.microseconds:.1f} \\[{min(cost.decision):.1f}–{max(cost.decision):.1f}]" for cost in costs.by_queue
        ]
        submit = f"{costs.by_queue[-1].submit_microseconds:.1f}"
        made.add_row(str(costs.setting), *cells, f"{costs.growth:.2f}", submit)
    return made


def verdict_table(checks: Sequence[Check]) -> Table:
    made = table("Targets", "figure", "value", "target", "")
    for check in checks:
        mark = "[green]met[/]" if check.is_met else "[bold red]missed[/]"
        value = f"{check.value:.3f}" if check.value < 10 else f"{check.value:.1f}"
        made.add_row(check.name, f"{value}{check.unit}", check.target, mark)
    return made


def markdown(found: Found) -> str:
    """The results as docs/benchmarks.md has them."""
    columns = [(load, figure) for load in LOADS for figure in FIGURES if figure != "makespan" or load == "burst"]
    heads = [f"{load} {figure}" if figure == "p95" else figure for load, figure in columns]
    lines = [f"| latency ÷ the reference's | {' | '.join(heads)} |", f"|---|{'---:|' * len(columns)}"]
    for name in ("least_work", "round_robin", "early_least_connections", "early_round_robin"):
        ratios = [found.unequal.ratio(load, name, figure) for load, figure in columns]
        shown = "late round_robin" if name == "round_robin" else name.replace("early_", "early ")
        lines.append(
            f"| {shown} | {' | '.join(f'{ratio:.2f}' if ratio < 10 else f'{ratio:.0f}' for ratio in ratios)} |"
        )
    queues = [f"{cost.queue:,}" for cost in found.costs[0].by_queue]
    lines += [
        "",
        f"| a decision in µs, by the tasks that wait | {' | '.join(queues)} | longest ÷ shortest |",
        f"|---|{'---:|' * (len(queues) + 1)}",
    ]
    for costs in found.costs:
        cells = [f"{cost.microseconds:.0f}" for cost in costs.by_queue]
        lines.append(f"| {costs.setting} | {' | '.join(cells)} | {costs.growth:.2f} |")
    lines += ["", "| | one endpoint | four |", "|---|---:|---:|"]
    rows = {
        "throughput of batches ÷ full batches": [f"{one.throughput:.3f}" for one in found.batching],
        "latency when idle ÷ without batches": [f"{one.idle_latency:.3f}" for one in found.batching],
        "images a call at saturation": [f"{one.images / one.calls:.1f}" for one in found.batching],
        "p95 wait beside a flood, where a call takes 1 s": [f"{one.beside_p95:.2f} s" for one in found.floods],
    }
    lines += [f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()]
    fair = "; ".join(f"{one.what} {one.index:.4f}" for one in found.fairness)
    before, after = found.calibration_ms
    lines += ["", f"Jain's index: {fair}. The fixed loop took {before:.0f} and {after:.0f} ms."]
    if found.million_seconds is not None:
        lines[-1] += f" A million tasks took {found.million_seconds:.0f} s."
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- plots


def plots(found: Found, directory: Path) -> list[Path]:
    directory.mkdir(parents=True, exist_ok=True)
    # with one slot an endpoint, late least_connections is late round_robin
    shown = ("least_work", "round_robin", "early_least_connections", "early_round_robin")

    def name_of(dispatcher: str) -> str:
        return "late round_robin" if dispatcher == "round_robin" else dispatcher.replace("early_", "early ")

    def bars(figure: str) -> Panel:
        series = [
            Series(name_of(each), (), [found.unequal.ratio(load, each, figure) for load in LOADS]) for each in shown
        ]
        return Panel(f"{figure} of the latency / reference", "load", "", series, LOADS, y_most=3.0, target=1.0)

    def curve(dispatcher: str) -> Series:
        ordered = sorted(found.unequal.reports[dispatcher].latencies())
        shares = [place / 400 for place in range(401)]
        xs = [percentile(ordered, level) for level in shares]
        return Series(name_of(dispatcher), xs, shares, dashed=dispatcher == "reference")

    def slowest(dispatcher: str) -> Series:
        ordered = sorted(found.unequal.reports[dispatcher].latencies())
        levels = [90 + place / 20 for place in range(199)]
        ys = [percentile(ordered, level / 100) for level in levels]
        return Series(name_of(dispatcher), levels, ys, dashed=dispatcher == "reference")

    curves = ("least_work", "round_robin", "early_least_connections", "reference")

    def growth(costs: Costs) -> Series:
        setting, by_queue = costs.setting, costs.by_queue
        name = str(setting).replace(f", {setting.endpoints} endpoints", "")
        return Series(name, [float(cost.queue) for cost in by_queue], [cost.microseconds for cost in by_queue])

    panels = {
        "ratios": (
            "Eight unequal endpoints: how much longer the slowest tasks take than under the reference",
            "Mixed sizes and steps; the reference knows every speed, least_work learns them. Cut bars say their value.",
            [bars("p95"), bars("p99")],
        ),
        "latency": (
            "Eight unequal endpoints at 90 % load: latency",
            f"One seed, {TASKS:,} tasks, all dispatchers meet the same arrivals and the same noise.",
            [
                Panel(
                    "Share of tasks done within",
                    "seconds, logarithmic",
                    "",
                    [curve(each) for each in curves],
                    log_x=True,
                    percent_y=True,
                ),
                Panel(
                    "The slowest tenth",
                    "percentile",
                    "seconds",
                    [slowest(each) for each in curves],
                    x_least=90,
                ),
            ],
        ),
        "decision": (
            "What a decision costs, by the tasks that wait",
            "finish + next_batches in saturation, median of the rounds; dashed: the target.",
            [
                Panel(
                    f"{endpoints} endpoints",
                    "tasks that wait, logarithmic",
                    "microseconds",
                    [growth(costs) for costs in found.costs if costs.setting.endpoints == endpoints],
                    log_x=True,
                    target=COST_TARGETS[endpoints],
                )
                for endpoints in COST_TARGETS
            ],
        ),
    }
    files = []
    for name, (title, subtitle, each) in panels.items():
        files.append(directory / f"scheduling-{name}.png")
        save(draw(title, subtitle, each), files[-1])
    return files


# ----------------------------------------------------------------------------------------------------------------- main


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str], None]]:
    if not console.is_terminal:
        shown: set[str] = set()

        def say(what: str) -> None:
            stage = what.partition(",")[0]
            if stage not in shown:
                shown.add(stage)
                console.print(f"{time.strftime('%H:%M:%S')} {stage}")

        yield say
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    # Drawn when something new begins: a refreshing thread would take time from what is measured.
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def advance(what: str) -> None:
            bar.update(task, description=what)
            bar.refresh()

        yield advance


def record(found: Found, checks: Sequence[Check]) -> dict[str, object]:
    return {
        "python": sys.version,
        "machine": platform.platform(),
        "seeds": found.seeds,
        "checks": [dataclasses.asdict(one) | {"met": one.is_met} for one in checks],
        "unequal_endpoints_seconds": found.unequal.seconds,
        "unequal_endpoints_ratios": {
            load: {
                name: {figure: found.unequal.ratio(load, name, figure) for figure in FIGURES} for name in DISPATCHERS
            }
            for load in LOADS
        },
        "batching": [dataclasses.asdict(one) for one in found.batching],
        "floods": [dataclasses.asdict(one) for one in found.floods],
        "fairness": [dataclasses.asdict(one) for one in found.fairness],
        "decision_costs": [dataclasses.asdict(one) for one in found.costs],
        "calibration_ms": found.calibration_ms,
        "million_seconds": found.million_seconds,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--quick", action="store_true", help="3 seeds, shorter queues, no million tasks: under a minute"
    )
    parser.add_argument("--virtual", action="store_true", help="only what needs no clock: the same on every machine")
    parser.add_argument("--seeds", type=int, metavar="N", help="seeds of each case (default 10, quick 3)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="also draw scheduling-*.png there")
    parser.add_argument("--markdown", action="store_true", help="also show the results as docs/benchmarks.md has them")
    options = parser.parse_args(arguments)
    if options.virtual and (options.plots or options.markdown):
        parser.error("--plots and --markdown show what a decision costs, too: leave --virtual out")
    if options.seeds is None:
        options.seeds = 3 if options.quick else 10
    if not 1 <= options.seeds <= 1000:
        parser.error("--seeds is 1 to 1000")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    with progress(console) as advance:
        found = measure(options, advance)
    checks = found.checks()
    OUT.mkdir(exist_ok=True)
    file = OUT / time.strftime("scheduling-%Y%m%d-%H%M%S.json")
    file.write_text(json.dumps(record(found, checks), indent=1, ensure_ascii=False) + "\n")
    console.print(
        unequal_table(found.unequal, found.seeds),
        batching_table(found.batching),
        tenants_table(found.floods, found.fairness),
        *([cost_table(found)] if found.costs else []),
        verdict_table(checks),
        sep="\n",
    )
    if options.markdown:
        console.print(markdown(found), markup=False, soft_wrap=True)
    if options.quick:
        console.print("--quick: no million tasks, no queue of 100,000; few seeds, so the ratios are rough")
    if options.plots is not None:
        for path in plots(found, options.plots):
            console.print(f"drawn: {path}", markup=False)
    missed = [check.name for check in checks if not check.is_met]
    drift = statistics.fmean(found.calibration_ms) / min(found.calibration_ms) if found.costs else 1.0
    if drift > 1.1:
        console.print("note: the machine changed its speed while decisions were timed; take those figures again")
    console.print(f"all figures: {file}", markup=False)
    console.print("every target is met" if not missed else f"missed: {'; '.join(missed)}", style="bold", markup=False)
    return 1 if options.check and missed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Elsewhere than on a terminal rich would fold the tables into 80 columns.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    try:
        return run(options, console)
    except KeyboardInterrupt:
        console.print("interrupted")
        return 130


if __name__ == "__main__":
    sys.exit(main())
