"""Ten scripted servers on real sockets behind the real gateway, under load: kill, hang and spoil some, and see who notices.

It measures; it is no test: the exit status is 0 unless something went wrong (1). With `--check` it is also 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from faults_cases import (
    CALLS_JUDGED_FROM_SECONDS,
    FAULTS,
    HEALTHY,
    MOST_CALLS_A_REQUEST,
    CaseFigures,
    Fault,
    Stage,
    run_case,
)
from faults_endings import BATCH_SECONDS, Finding, leaving, stopping
from faults_fleet import Fleet
from faults_gateway import BackendPlan, running
from faults_load import Client
from processes import BenchError, Cores, to_an_end
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from servers import GATEWAY, new_key

OUT = Path(__file__).parent / "out"
SERVERS = 10
ENDINGS = ("leaving", "stopping")
# How long leaving and stopping take together, for the progress bar.
_ENDINGS_SECONDS = 20.0


@contextlib.contextmanager
def progress(total_seconds: float) -> Iterator[Callable[[str], None]]:
    """A bar on standard error that knows how long the cases take; elsewhere than on a terminal a line for each."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what: console.print(f"{time.strftime('%H:%M:%S')} {what}")
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


async def measure(
    options: argparse.Namespace, directory: Path, cores: Cores, say: Callable[[str], None]
) -> tuple[list[CaseFigures], list[Finding]]:
    """Everything that was asked for; one gateway lives through all the faults, so that what leaks adds up."""
    key = new_key()
    cases: list[CaseFigures] = []
    findings: list[Finding] = []
    async with Fleet(cores.others) as fleet:
        say("starting the servers")
        servers = await fleet.add({"latency_seconds": 0.05 + 0.005 * number} for number in range(SERVERS))
        hung, shared = await fleet.add([{"sequence": ["hang"]}, {"faces": ["a1111"], "latency_seconds": BATCH_SECONDS}])
        plans = [
            BackendPlan("fleet", "openai", servers),
            BackendPlan("alone", "openai", [hung]),
            BackendPlan("shared", "a1111", [shared], max_concurrency=1),
        ]
        async with running(directory / "gateway", key, plans, core=cores.proxy) as gateway:
            client = Client(gateway.port, key, "fleet")
            ports = [server.port for server in fleet.servers]
            stage = Stage(gateway, servers, client, options.rate, ports)
            await client.load(2 * SERVERS, options.rate)
            client.close()
            await asyncio.sleep(1)
            stage.other_files = gateway.sockets(ports).other
            cases.append(await run_case(stage, HEALTHY, 0, max(3.0, options.seconds / 6)))
            if cases[0].errors == cases[0].requests:
                raise BenchError(f"not one picture while all is well: {cases[0].told_errors[0]}")
            for index, fault in enumerate(options.faults):
                say(f"{fault.name}: {fault.text}")
                if not await stage.settle(2 * min(10.0, options.seconds)):
                    say(f"{fault.name}: begins although not every endpoint is back in use")
                cases.append(await run_case(stage, fault, 2 * index, options.seconds))
                say(f"{fault.name}: {'; '.join(cases[-1].misses) or 'all targets met'}")
            if "leaving" in options.endings:
                say("clients that leave")
                findings += await leaving(gateway, key, hung, shared)
        if "stopping" in options.endings:
            say("SIGTERM")
            findings += await stopping(directory, key, fleet, cores.proxy)
    return cases, findings


# --------------------------------------------------------------------------------------------------------------- report


def fault_table(cases: Sequence[CaseFigures], options: argparse.Namespace) -> Table:
    judged = options.seconds >= CALLS_JUDGED_FROM_SECONDS
    most = f"≤ {MOST_CALLS_A_REQUEST:g}" if judged else "not judged"
    table = Table(
        title=f"{SERVERS} servers, {options.rate:g} requests/s, {options.seconds:g} s a fault; targets in brackets",
        caption="calls: POSTs that reached a server; attempts: the gateway's own count. out, back: seconds until every "
        "server that was hit was out of use after the fault began, and in use again after it ended.",
    )
    headings = (
        "fault", "requests", "errors \\[0]", f"calls a request \\[{most}]", f"attempts a request \\[{most}]",
        "p50, ms", "p99, ms", "p99 in the fault", "out, s", "back, s", "leaks \\[none]", "verdict",
    )  # fmt: skip
    for heading in headings:
        table.add_column(heading, justify="left" if heading in {"fault", "verdict"} else "right")
    for each in cases:
        errors = f"{each.errors - each.errors_before_out} (+{each.errors_before_out} before)"
        table.add_row(
            each.name,
            f"{each.requests:,}",
            errors if each.name == "nine" else str(each.errors),
            f"{each.calls_per_request:.3f}",
            f"{each.attempts_per_request:.3f}",
            f"{each.p50_ms:.0f}",
            f"{each.p99_ms:.0f}",
            f"{each.p99_fault_ms:.0f}" if each.p99_fault_ms else "",
            "–" if each.out_after is None else f"{each.out_after:.1f}",
            "–" if each.back_after is None else f"{each.back_after:.1f}",
            str(len(each.leaks) or "none"),
            f"[red]{escape('; '.join(line[:80] for line in each.misses))}[/]" if each.misses else "[green]met[/]",
        )
    return table


def ending_table(findings: Sequence[Finding]) -> Table:
    table = Table(title="Clients that leave, and a gateway that stops")
    for heading in ("", "measured", "target", "verdict"):
        table.add_column(heading)
    for each in findings:
        verdict = "[green]met[/]" if each.met else "[red]MISSED[/]"
        table.add_row(each.name, escape(each.value), each.target, verdict)
    return table


def misses_of(cases: Sequence[CaseFigures], findings: Sequence[Finding]) -> list[str]:
    missed = [f"{each.name}: {', '.join(line[:80] for line in each.misses)}" for each in cases if each.misses]
    return missed + [f"{each.name}: {each.value}" for each in findings if not each.met]


def machine(cores: Cores) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    described = subprocess.run(
        ["git", "-C", str(OUT.parent), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "cpu": next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "gateway_core": cores.proxy,
        "others_core": cores.others,
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "commit": described.stdout.strip(),
    }


def report(
    options: argparse.Namespace,
    about: dict[str, object],
    cases: Sequence[CaseFigures],
    findings: Sequence[Finding],
    console: Console,
) -> int:
    """Print it all and leave the JSON file; the exit status."""
    missed = misses_of(cases, findings)
    OUT.mkdir(exist_ok=True)
    file = OUT / time.strftime("faults-%Y%m%d-%H%M%S.json")
    record = {
        "machine": about,
        "seconds": options.seconds,
        "requests_per_second": options.rate,
        "cases": [
            dataclasses.asdict(each)
            | {
                "calls_per_request": each.calls_per_request,
                "attempts_per_request": each.attempts_per_request,
                "misses": each.misses,
            }
            for each in cases
        ],
        "endings": [dataclasses.asdict(each) for each in findings],
        "missed": missed,
    }
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    console.print(fault_table(cases, options))
    for each in cases:
        failed = "; ".join(f"{count} × {what}" for what, count in each.outcomes.items()) or "no attempt failed"
        console.print(f"{each.name} ({each.text}): {failed}. Open a second later: {each.sockets}", markup=False)
    if findings:
        console.print(ending_table(findings))
    for each in cases:
        for told in each.told_errors[:3]:
            console.print(f"{each.name}, an error: {json.dumps(told, ensure_ascii=False)}", style="red", markup=False)
        for line in each.leaks:
            console.print(f"{each.name}, left behind: {line}", style="red", markup=False)
    console.print(f"all figures: {file.relative_to(OUT.parent.parent)}")
    verdict = f"verdict: MISSED {'; '.join(missed)}" if missed else "verdict: every target met"
    console.print(verdict, style="bold", markup=False)
    return int(options.check and bool(missed))


# -------------------------------------------------------------------------------------------------------------- program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    known = [fault.name for fault in FAULTS]

    def chosen(text: str) -> list[str]:
        return [each for each in text.split(",") if each]

    parser.add_argument("--seconds", type=float, default=60.0, help="load for each fault (default 60)")
    parser.add_argument("--quick", action="store_true", help="5 s for each fault: only to see that it runs")
    parser.add_argument("--rate", type=float, default=60.0, help="requests a second (default 60)")
    parser.add_argument(
        "--only", type=chosen, default=[*known, *ENDINGS], metavar="NAME,…", help=f"of {', '.join([*known, *ENDINGS])}"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the log of the gateway that the faults are for")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = 5.0
    if not 2 <= options.seconds <= 600 or not 1 <= options.rate <= 200:
        parser.error("--seconds is 2 to 600, --rate 1 to 200")
    if unknown := [name for name in options.only if name not in [*known, *ENDINGS]]:
        parser.error(f"--only: there is no {unknown[0]!r}")
    faults: list[Fault] = [fault for fault in FAULTS if fault.name in options.only]
    options.faults = faults
    options.endings = [name for name in ENDINGS if name in options.only]
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    cores = Cores.choose()
    about = machine(cores)
    os.sched_setaffinity(0, {cores.others})  # the clients stay out of the gateway's way
    total = len(options.faults) * (options.seconds + 3) + options.seconds / 6 + _ENDINGS_SECONDS * bool(options.endings)

    async def all_of_it(directory: Path) -> tuple[list[CaseFigures], list[Finding]]:
        with progress(total) as say:
            return await measure(options, directory, cores, say)

    with tempfile.TemporaryDirectory(prefix="img-serving-faults-") as name:
        try:
            cases, findings = asyncio.run(all_of_it(Path(name)))
        finally:
            if options.log is not None:
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(Path(name) / "gateway" / "gateway.out", options.log)
    return report(options, about, cases, findings, console)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=200)
    if not GATEWAY.exists():
        console.print(f"{GATEWAY} not found: run make install first")
        return 2
    return to_an_end(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
