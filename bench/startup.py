"""How fast the gateway starts, what it weighs when idle, and (with `--install`) how large a core install is.

It measures; it is no test: the exit status is 0 unless something went wrong (1). With `--check` it is also 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from processes import BenchError, Cores, free_ports, rss_bytes
from rich.console import Console
from rich.table import Table
from servers import GATEWAY, new_key, start_gateway

HERE = Path(__file__).parent
TARGETS = {"start to ready, s": 1.0, "idle memory, MB": 90.0, "core install, MB": 165.0}


@dataclass(frozen=True)
class Figure:
    """One measured quantity against the most it may be."""

    name: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def at_most(self) -> float:
        return TARGETS[self.name]

    @property
    def is_met(self) -> bool:
        return self.median <= self.at_most


def start_once(core: int, options: argparse.Namespace) -> tuple[float, float]:
    """Seconds from the start of the process to a 200 from /readyz, and MB of its tree after 1 s of doing nothing."""
    with tempfile.TemporaryDirectory(prefix="img-serving-startup-") as name:
        directory = Path(name)
        config = f"""
[server]
data_dir = "{directory}/data"

[auth]
api_keys = ["{new_key()}"]

[storage]
dir = "{directory}/images"
"""
        program, seconds = start_gateway(
            directory,
            config,
            free_ports(1)[0],
            core,
            command=options.gateway_command,
            ready_path=options.ready_path,
            poll_seconds=0.005,
        )
        with program:
            time.sleep(1)
            return seconds, rss_bytes(program.pid) / 1e6


def install_size(python: str) -> tuple[float, float]:
    """MB on disk of a new virtual environment after `pip install .`, and how much of that was there before (pip itself)."""
    with tempfile.TemporaryDirectory(prefix="img-serving-install-") as name:
        venv = Path(name) / "venv"
        _run([python, "-m", "venv", str(venv)])
        empty = _disk_megabytes(venv)
        _run([str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", str(HERE.parent)])
        return _disk_megabytes(venv), empty


def _disk_megabytes(directory: Path) -> float:
    """Blocks in use, as `du` counts them, compiled files included."""
    return sum(each.lstat().st_blocks * 512 for each in directory.rglob("*")) / 1e6


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600
    )
    if done.returncode:
        raise BenchError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stdout[-2000:]}")


def run(options: argparse.Namespace, console: Console) -> int:
    core = Cores.choose().proxy
    start_once(core, options)  # reads the program's files into the page cache
    starts = []
    for number in range(options.rounds):
        starts.append(start_once(core, options))
        seconds, megabytes = starts[-1]
        console.print(f"start {number + 1} of {options.rounds}: {seconds:.2f} s, {megabytes:.1f} MB")
    seconds, megabytes = zip(*starts, strict=True)
    figures = [Figure("start to ready, s", seconds), Figure("idle memory, MB", megabytes)]
    if options.install:
        console.print("making a virtual environment with a core install …")
        whole, empty = install_size(sys.executable)
        console.print(f"of {whole:.1f} MB, the empty environment with pip has {empty:.1f} MB")
        figures.append(Figure("core install, MB", (whole,)))

    table = Table(title=f"Start-up on one core, warm file cache, {options.rounds} starts (MB = 10⁶ bytes)")
    for heading in ("", "median", "least", "most", "at most", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for each in figures:
        numbers = (f"{value:.2f}" for value in (each.median, min(each.values), max(each.values)))
        table.add_row(each.name, *numbers, f"{each.at_most:g}", "[green]within[/]" if each.is_met else "[red]OVER[/]")
    console.print(table)
    out = HERE / "out"
    out.mkdir(exist_ok=True)
    file = out / time.strftime("startup-%Y%m%d-%H%M%S.json")
    record = [asdict(each) | {"median": each.median, "at_most": each.at_most, "met": each.is_met} for each in figures]
    file.write_text(json.dumps(record, indent=1) + "\n")
    judged = (
        f"{each.name} {each.median:.2f} ({'within' if each.is_met else 'OVER'} {each.at_most:g})" for each in figures
    )
    console.print(f"verdict: {'; '.join(judged)}", style="bold", markup=False)
    return int(options.check and not all(each.is_met for each in figures))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 51), metavar="N", help="starts (default 5)")
    parser.add_argument(
        "--install", action="store_true", help="also install the core into a new environment: needs network"
    )
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument(
        "--gateway-command",
        default="",
        help="start this instead of img-serving; {port}, {config} and {dir} are filled in",
    )
    parser.add_argument("--ready-path", default="/readyz", help="answers 200 once the gateway is up (default /readyz)")
    options = parser.parse_args(arguments)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=120)
    if not options.gateway_command and not GATEWAY.exists():
        console.print(f"{GATEWAY} not found: run make install first")
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs and nothing is left behind
    try:
        return run(options, console)
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except (BenchError, subprocess.TimeoutExpired) as error:
        console.print(f"ERROR {error}", style="red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
