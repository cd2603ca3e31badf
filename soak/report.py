"""What a soak found: rows with a target each, a table of them, the figures as JSON, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from programs import SoakError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

OUT = Path(__file__).parent / "out"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. `met` None: told, and not judged. `details` are the offenders, each a line."""

    name: str
    measured: str
    target: str = ""
    met: bool | None = None
    details: Sequence[str] = ()


def none_of(name: str, offenders: Sequence[str], of: str) -> Finding:
    """A finding whose target is that there are no offenders among `of`."""
    return Finding(name, f"{len(offenders)} of {of}", "0", not offenders, offenders)


def table_of(name: str, findings: Sequence[Finding]) -> Table:
    table = Table(title=name)
    for heading in ("", "measured", "target", "verdict"):
        table.add_column(heading)
    for each in findings:
        verdict = "" if each.met is None else "[green]met[/]" if each.met else "[red]MISSED[/]"
        table.add_row(each.name, escape(each.measured), each.target, verdict)
    return table


def console_of() -> Console:
    """Elsewhere than on a terminal rich would fold tables into 80 columns."""
    return Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)


def machine() -> dict[str, object]:
    """Where the figures are from."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def report(
    console: Console, name: str, findings: Sequence[Finding], figures: Mapping[str, object], *, out: Path = OUT
) -> int:
    """Print the table, leave the JSON file, say the verdict; the exit status."""
    missed = [each for each in findings if each.met is False]
    out.mkdir(parents=True, exist_ok=True)
    file = out / time.strftime(f"{name}-%Y%m%d-%H%M%S.json")
    record = {
        "machine": machine(),
        **figures,
        "findings": [dataclasses.asdict(each) for each in findings],
        "missed": [each.name for each in missed],
    }
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.print(table_of(name, findings))
    for each in missed:
        for line in each.details[:5]:
            console.print(f"{each.name}: {line[:600]}", style="red", markup=False)
        if len(each.details) > 5:
            console.print(f"{each.name}: and {len(each.details) - 5} more, in the file", style="red", markup=False)
    console.print(f"all figures: {file}", markup=False)
    told = "; ".join(f"{each.name}: {each.measured}" for each in missed)
    console.print(f"verdict: MISSED {told}" if missed else "verdict: every target met", style="bold", markup=False)
    return int(bool(missed))


@contextlib.contextmanager
def progress(total_seconds: float) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that knows about how long it takes; elsewhere than on a terminal a line for each stage."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what: console.print(f"{time.strftime('%H:%M:%S')} {what}", markup=False)
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as bar:
        task = bar.add_task("starting", total=total_seconds)
        begun = time.monotonic()

        async def move() -> None:
            while True:
                bar.update(task, completed=min(total_seconds, time.monotonic() - begun))
                await asyncio.sleep(0.5)

        moving = asyncio.get_running_loop().create_task(move())
        try:
            yield lambda what: bar.update(task, description=what)
        finally:
            moving.cancel()


def to_an_end(run: Callable[[], int], console: Console) -> int:
    """The exit status of a soak, which leaves no process behind, however it is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    try:
        return run()
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except (SoakError, TimeoutError, ExceptionGroup) as error:
        for one in _flat(error):
            console.print(f"ERROR {type(one).__name__}: {one}", style="red", markup=False)
        return 1


def _flat(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for one in error.exceptions:
            yield from _flat(one)
    else:
        yield error


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of the values does not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
