"""Load the gateway and nginx as a plain reverse proxy in front of one canned upstream, and print ratios to nginx.

It measures; it is no test: the exit status is 0 unless something went wrong (1) or a tool is missing (2). With `--check`
it is also 1 when a target is missed. docs/benchmarks.md says what the figures mean.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from load import Case, Turn, take_turn
from processes import Cores, free_ports, peak_rss_bytes, rss_bytes, to_an_end
from profiling import profile, py_spy
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from servers import (
    GATEWAY,
    Reply,
    Target,
    canned_replies,
    check_reply,
    gateway_config,
    new_key,
    start_gateway,
    start_nginx_proxy,
    start_upstream,
)

OUT = Path(__file__).parent / "out"
REFERENCE = "nginx"
# CPU per request, at most so many times nginx's.
TARGETS = {"small c=32": 12.0, "2 MB c=32": 2.5}


@dataclass(frozen=True)
class Spread:
    """Some rounds of one figure."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.least:.2f}–{self.most:.2f}]"


@dataclass(frozen=True)
class Comparison:
    """One case: medians of both proxies, and the gateway's figures as multiples of nginx's in the same round."""

    case: str
    nginx: dict[str, float]
    gateway: dict[str, float]
    ratios: dict[str, Spread]

    @property
    def target(self) -> float | None:
        return TARGETS.get(self.case)

    @property
    def is_met(self) -> bool:
        return self.target is None or self.ratios["cpu_us_per_request"].median <= self.target


FIGURES = ("cpu_us_per_request", "requests_per_second", "p50_ms", "p99_ms")


def compare(turns: Sequence[Turn], case: str, gateway: str) -> Comparison:
    """Pair the turns of one case by round."""
    rounds = {(turn.proxy, turn.round): turn for turn in turns if turn.case == case}
    numbers = sorted({number for _, number in rounds})

    def median(proxy: str, figure: str) -> float:
        return statistics.median(getattr(rounds[proxy, number], figure) for number in numbers)

    def ratio(figure: str) -> Spread:
        pairs = ((rounds[gateway, number], rounds[REFERENCE, number]) for number in numbers)
        return Spread.of([getattr(ours, figure) / max(getattr(theirs, figure), 1e-9) for ours, theirs in pairs])

    return Comparison(
        case,
        {figure: median(REFERENCE, figure) for figure in FIGURES},
        {figure: median(gateway, figure) for figure in FIGURES},
        {figure: ratio(figure) for figure in FIGURES},
    )


# -------------------------------------------------------------------------------------------------------------- measure


@dataclass(frozen=True)
class Bench:
    """Everything that is up and running, and how a turn is taken."""

    upstream: Target
    proxies: tuple[Target, ...]
    replies: dict[str, Reply]
    cases: tuple[Case, ...]
    cores: Cores
    wrk: str
    key: str
    reply_bytes: Mapping[tuple[str, str], int]

    def turn(self, target: Target, case: Case, round_: int, seconds: int) -> Turn:
        reply = self.replies[case.model]
        return take_turn(
            self.wrk,
            target,
            self.upstream,
            reply,
            case,
            round_=round_,
            seconds=seconds,
            core=self.cores.others,
            key=self.key,
            # A header such as a time may be a few digits shorter than when it was checked.
            least_bytes=0.95 * self.reply_bytes[target.name, case.model],
        )


def measure(bench: Bench, rounds: int, seconds: int, advance: Callable[[str], None]) -> list[Turn]:
    """Round 0 warms up and is told apart; then short turns, the order turned round every other time."""
    turns = []
    for case in bench.cases:
        for target in bench.proxies:
            advance(f"warm-up, {case.label}, {target.name}")
            turns.append(bench.turn(target, case, 0, 1))
    for round_ in range(1, rounds + 1):
        order = bench.proxies if round_ % 2 else bench.proxies[::-1]
        for case in bench.cases:
            for target in order:
                advance(f"round {round_} of {rounds}, {case.label}, {target.name}")
                turns.append(bench.turn(target, case, round_, seconds))
    return turns


@contextlib.contextmanager
def servers(options: argparse.Namespace, cases: tuple[Case, ...], cores: Cores) -> Iterator[Bench]:
    """All servers up and checked in a temporary directory, which goes away with them."""
    nginx, wrk = find_tool("nginx"), find_tool("wrk")
    replies, key = canned_replies(), new_key()
    with contextlib.ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="img-serving-bench-")))
        count = len(replies)
        ports = free_ports(2 * count + 2)
        upstream = start_upstream(nginx, directory, replies, ports[: count + 1], cores)
        stack.enter_context(upstream.program)
        for model, reply in replies.items():
            check_reply("upstream", upstream.ports[model], reply, key)
        reference = start_nginx_proxy(nginx, directory, upstream, ports[count + 1 : 2 * count + 1], cores)
        stack.enter_context(reference.program)
        values = {name: f"http://127.0.0.1:{port}" for name, port in upstream.ports.items() if name != "status"}
        program, _ = start_gateway(
            directory / "gateway",
            gateway_config(directory / "gateway", upstream.ports, key),
            ports[-1],
            cores.proxy,
            command=options.gateway_command,
            ready_path=options.ready_path,
            values={**values, "key": key},
        )
        stack.enter_context(program)
        gateway = Target(options.gateway_name, program, dict.fromkeys(replies, ports[-1]))
        reply_bytes = {
            (target.name, model): check_reply(target.name, target.ports[model], replies[model], key)
            for target in (reference, gateway)
            for model in {case.model for case in cases}
        }
        yield Bench(upstream, (reference, gateway), replies, cases, cores, wrk, key, reply_bytes)


# --------------------------------------------------------------------------------------------------------------- report


def ratio_table(comparisons: Sequence[Comparison], gateway: str) -> Table:
    table = Table(title=f"{gateway} ÷ nginx: median \\[min–max] of the rounds")
    for heading in ("reply, connections", "CPU a request", "at most", "requests/s", "p50", "p99"):
        table.add_column(heading, justify="left" if heading.startswith("reply") else "right", no_wrap=True)
    for each in comparisons:
        cpu, *others = (escape(str(each.ratios[figure])) for figure in FIGURES)
        if each.target is None:
            table.add_row(each.case, cpu, "", *others)
        else:
            table.add_row(each.case, f"[{'green' if each.is_met else 'red'}]{cpu}[/]", f"{each.target:g}", *others)
    return table


def absolute_table(comparisons: Sequence[Comparison], gateway: str) -> Table:
    table = Table(title="On this machine, now: medians of the rounds")
    for heading in ("reply, connections", "", "CPU a request, µs", "requests/s", "p50, ms", "p99, ms"):
        table.add_column(heading, justify="right" if len(table.columns) > 1 else "left", no_wrap=True)
    for each in comparisons:
        for case, name, figures in ((each.case, "nginx", each.nginx), ("", gateway, each.gateway)):
            cells = (f"{figures[figure]:,.{digits}f}" for figure, digits in zip(FIGURES, (1, 0, 2, 2), strict=True))
            table.add_row(case, name, *cells)
        table.add_section()
    return table


def memory_table(memory: dict[str, dict[str, int]]) -> Table:
    table = Table(title="Resident memory of the process tree, MB (10⁶ bytes)")
    for heading in ("", "idle, before", "after the load", "highest"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, each in memory.items():
        table.add_row(name, *(f"{each[moment] / 1e6:.1f}" for moment in ("idle", "after", "peak")))
    return table


def notes(turns: Sequence[Turn], bench: Bench) -> list[str]:
    """What a reader should know before believing the figures."""
    found = []
    for case in bench.cases:
        for target in bench.proxies:
            mine = [turn for turn in turns if turn.round and (turn.proxy, turn.case) == (target.name, case.label)]
            answered = sum(turn.requests for turn in mine)
            cut_off = case.connections * len(mine)  # in flight when wrk's time was up
            if sum(turn.upstream_requests for turn in mine) > 1.02 * answered + cut_off + 20:
                found.append(
                    f"{target.name}, {case.label}: the upstream got more requests than were answered (retries?)"
                )
            opened = sum(turn.upstream_connections for turn in mine)
            if opened > 0.1 * answered + 2 * cut_off + 20:
                found.append(f"{target.name}, {case.label}: {opened} upstream connections for {answered} requests")
    return found


def errors_of(turns: Sequence[Turn]) -> list[str]:
    return [
        f"{turn.proxy}, {turn.case}, {f'round {turn.round}' if turn.round else 'warm-up'}: "
        + ", ".join(f"{count} {kind}" for kind, count in turn.errors.items() if count)
        for turn in turns
        if any(turn.errors.values())
    ]


def verdict(comparisons: Sequence[Comparison]) -> str:
    judged = [
        f"{each.case} {each.ratios['cpu_us_per_request'].median:.2f}× nginx's CPU"
        f" ({'within' if each.is_met else 'OVER'} {each.target:g}×)"
        for each in comparisons
        if each.target is not None
    ]
    return "verdict: " + ("; ".join(judged) if judged else "no case with a target was measured")


def machine(cores: Cores, options: argparse.Namespace) -> dict[str, object]:
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    return {
        "cpu": next((line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")), "unknown"),
        "cores": len(os.sched_getaffinity(0)),
        "proxy_core": cores.proxy,
        "others_core": cores.others,
        "load_average": os.getloadavg()[0],
        "kernel": platform.release(),
        "python": platform.python_version(),
        "nginx": _first_line([find_tool("nginx"), "-v"]),
        "wrk": _first_line([find_tool("wrk"), "-v"]),
        "gateway": options.gateway_command or _first_line([str(GATEWAY), "--version"]),
        "commit": _first_line(["git", "-C", str(OUT.parent), "describe", "--always", "--dirty"]),
    }


def _first_line(command: Sequence[str]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=30)
    return (done.stdout.splitlines() or [""])[0].strip()


def find_tool(name: str) -> str:
    """Debian keeps nginx in /usr/sbin, which is not on everybody's path."""
    return shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin") or ""


# -------------------------------------------------------------------------------------------------------------- program


@contextlib.contextmanager
def progress(console: Console, total: int) -> Iterator[Callable[[str], None]]:
    """A bar on a terminal, a line for each round elsewhere."""
    if console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
        # Drawn once a turn: a refreshing thread would share a core with wrk.
        with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
            task = bar.add_task("starting", total=total + 1)

            def advance(what: str) -> None:
                bar.update(task, description=what, advance=1)
                bar.refresh()

            yield advance
        return
    shown = set()

    def advance(what: str) -> None:
        stage = what.partition(",")[0]
        if stage not in shown:
            shown.add(stage)
            console.print(f"{time.strftime('%H:%M:%S')} {stage}")

    yield advance


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])

    def numbers(text: str) -> tuple[int, ...]:
        return tuple(int(each) for each in text.split(",") if each)

    parser.add_argument("--rounds", type=int, default=5, help="rounds to take medians of (default 5)")
    parser.add_argument("--quick", action="store_true", help="2 rounds of 1 s turns")
    parser.add_argument("--seconds", type=int, default=2, help="length of a turn (default 2)")
    parser.add_argument("--small", type=numbers, default=(1, 32, 256), metavar="C,…", help="connections, small replies")
    parser.add_argument("--big", type=numbers, default=(1, 32), metavar="C,…", help="connections, 2 MB replies")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    parser.add_argument(
        "--gateway-command",
        default="",
        help="run this instead of img-serving; {port}, {config}, {dir}, {key}, {small} and {big} (upstream URLs) are filled in",
    )
    parser.add_argument("--gateway-name", default="img-serving", help="what the tables call it")
    parser.add_argument("--ready-path", default="/readyz", help="answers 200 once the gateway is up (default /readyz)")
    parser.add_argument(
        "--profile", action="store_true", help="afterwards, sample the gateway with py-spy in each c=32 case"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.seconds = 2, 1
    if not 1 <= options.rounds <= 100 or not 1 <= options.seconds <= 60:
        parser.error("--rounds is 1 to 100, --seconds 1 to 60")
    if not all(1 <= each <= 512 for each in (*options.small, *options.big)) or not (*options.small, *options.big):
        parser.error("--small and --big take connections from 1 to 512, and one of them at least one")
    if options.check and (32 not in options.small or 32 not in options.big):
        parser.error("--check needs c=32 in --small and in --big: the targets are for those")
    if options.gateway_command and options.gateway_name == "img-serving":
        options.gateway_name = "other gateway"
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    """One whole benchmark; the exit status."""
    cores = Cores.choose()
    cases = tuple(
        Case(model, count, f"{label} c={count}")
        for model, label, counts in (("small", "small", options.small), ("big", "2 MB", options.big))
        for count in counts
    )
    about = machine(cores, options)
    if cores.shared:
        console.print(
            "One core only: proxies, wrk and the upstream share it. CPU a request still means something, the rest not."
        )
    else:
        console.print(f"proxies on core {cores.proxy}, wrk and upstream on core {cores.others}; {about['cpu']}")
    if float(str(about["load_average"])) > 0.5:
        console.print(f"The machine is busy (load average {about['load_average']:.1f}): expect wide ranges.")
    with servers(options, cases, cores) as bench:
        time.sleep(1)
        memory = {each.name: {"idle": rss_bytes(each.program.pid)} for each in bench.proxies}
        total = len(cases) * len(bench.proxies) * (options.rounds + 1)
        with progress(console, total) as advance:
            turns = measure(bench, options.rounds, options.seconds, advance)
        for each in bench.proxies:
            memory[each.name] |= {"after": rss_bytes(each.program.pid), "peak": peak_rss_bytes(each.program.pid)}
        profiled = [profile(bench, case, OUT) for case in cases if case.connections == 32] if options.profile else []
    measured = [turn for turn in turns if turn.round]
    comparisons = [compare(measured, case.label, options.gateway_name) for case in cases]
    errors, remarks = errors_of(turns), notes(turns, bench)

    OUT.mkdir(exist_ok=True)
    file = OUT / time.strftime("proxy-%Y%m%d-%H%M%S.json")
    record = {
        "machine": about,
        "rounds": options.rounds,
        "turn_seconds": options.seconds,
        "comparisons": [dataclasses.asdict(each) | {"target": each.target, "met": each.is_met} for each in comparisons],
        "memory_bytes": memory,
        "errors": errors,
        "notes": remarks,
        "verdict": verdict(comparisons),
        "turns": [dataclasses.asdict(turn) for turn in turns],
    }
    file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    tables = (
        ratio_table(comparisons, options.gateway_name),
        absolute_table(comparisons, options.gateway_name),
        memory_table(memory),
    )
    console.print(*tables, sep="\n")
    for line in profiled:
        console.print(line, markup=False)
    for line in remarks:
        console.print(f"note: {line}", markup=False)
    requests = sum(turn.requests for turn in turns)
    console.print(
        f"{requests:,} requests, {len(turns)} turns, errors: {len(errors) or 'none'}; all figures: {_short(file)}"
    )
    for line in errors:
        console.print(f"ERROR {line}", style="red", markup=False)
    console.print(verdict(comparisons), style="bold", markup=False)
    if errors or (options.check and not all(each.is_met for each in comparisons)):
        return 1
    return 0


def _short(file: Path) -> str:
    with contextlib.suppress(ValueError):
        return str(file.relative_to(Path.cwd()))
    return str(file)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    # Elsewhere than on a terminal rich would fold the table into 80 columns.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    missing = [name for name in ("nginx", "wrk") if not find_tool(name)]
    if missing:
        console.print(f"{' and '.join(missing)} not found. On Debian and Ubuntu: apt-get install nginx-light wrk")
        return 2
    if not options.gateway_command and not GATEWAY.exists():
        console.print(f"{GATEWAY} not found: run make install first")
        return 2
    if options.profile and not py_spy():
        console.print("py-spy not found. Into this environment: .venv/bin/pip install py-spy")
        return 2
    return to_an_end(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
