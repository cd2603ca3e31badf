"""How fast durable jobs are accepted, beside bare inserts of the same rows, and that plain requests write none.

It measures; it is no test: the exit status is 0 unless something went wrong (1). With `--check` it is also 1 when a
target is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import platform
import shlex
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httptools
from processes import BenchError, Cores, Program, free_ports, to_an_end
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from servers import new_key, start_gateway

OUT = Path(__file__).parent / "out"
CONNECTIONS = 32
STAGES = 6
# Of the speed of the bare loop, at least.
TARGET_RATIO = 0.25
# On a slow disk the bare loop would take longer than all the rest; its speed does not depend on how long it goes on.
MOST_BARE = 2_000
_BEFORE_A_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Load:
    """So many requests of one kind, and what they took."""

    requests: int
    seconds: float
    p50_ms: float
    p99_ms: float
    errors: list[str]

    @property
    def per_second(self) -> float:
        return self.requests / self.seconds


@dataclass(frozen=True)
class Look:
    """The job store as a second connection sees it. `version` changes with every commit of anybody else."""

    version: int
    rows: dict[str, int]
    files: dict[str, tuple[int, int]]
    """Size in bytes and time of the last change (ns) of the database and of its log."""


@dataclass(frozen=True)
class Figures:
    """One whole run."""

    accepted: Load
    bare_jobs: int
    bare_seconds: float
    bare_tables: dict[str, int]
    plain: Load
    before: Look
    after: Look
    after_a_job: Look
    ready_seconds: float
    known_after_kill: int

    @property
    def ratio(self) -> float:
        return self.accepted.per_second / self.bare_per_second

    @property
    def bare_per_second(self) -> float:
        return self.bare_jobs / self.bare_seconds

    @property
    def writes(self) -> bool:
        """Whether plain requests wrote anything."""
        return self.before != self.after

    @property
    def missed(self) -> list[str]:
        found = []
        if self.writes:
            found.append("plain requests wrote to the job store")
        if self.after_a_job.version == self.after.version:
            found.append("the look at the job store does not even see a job (the proof proves nothing)")
        if self.known_after_kill != self.accepted.requests + 1:
            found.append(
                f"{self.known_after_kill:,} jobs are known after a kill, {self.accepted.requests + 1:,} were accepted"
            )
        if self.ratio < TARGET_RATIO:
            found.append(f"{self.ratio:.2f} of the bare loop's speed, and not {TARGET_RATIO:g}")
        return found


# -------------------------------------------------------------------------------------------------------------- clients


class _Answers:
    """The answers of one connection, one after the other."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self._body = bytearray()
        self._is_complete = False
        self._parser = httptools.HttpResponseParser(self)

    def on_message_begin(self) -> None:
        self._body.clear()
        self._is_complete = False

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._is_complete = True

    async def next(self) -> tuple[int, bytes]:
        """Status and body. Raises ConnectionError where the connection ends first."""
        while not self._is_complete:
            if not (data := await self._reader.read(64 * 1024)):
                raise ConnectionError("the connection was closed before the whole answer")
            self._parser.feed_data(data)
        self._is_complete = False
        return self._parser.get_status_code(), bytes(self._body)


async def load(port: int, request: bytes, count: int, wanted_status: int) -> Load:
    """Send one request `count` times over kept-alive connections, each as fast as its answers come."""
    left = iter(range(count))
    took: list[float] = []
    errors: list[str] = []

    async def one_connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        answers = _Answers(reader)
        try:
            for _ in left:
                begun = time.perf_counter()
                writer.write(request)
                status, body = await answers.next()
                took.append(time.perf_counter() - begun)
                if status != wanted_status:
                    errors.append(f"{status}: {body[:300].decode(errors='replace')}")
        finally:
            writer.close()

    begun = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for _ in range(CONNECTIONS):
            tasks.create_task(one_connection())
    seconds = time.perf_counter() - begun
    ordered = sorted(took)
    return Load(count, seconds, 1000 * ordered[len(ordered) // 2], 1000 * ordered[int(0.99 * len(ordered))], errors)


def request_of(path: str, document: object, key: str) -> bytes:
    body = json.dumps(document).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def body_of(model: str) -> dict[str, Any]:
    return {"model": model, "prompt": "a lighthouse in the fog, seen from a small boat", "size": "64x64", "seed": 7}


def jobs_in_line(port: int, key: str, wanted: int) -> int:
    """How many jobs wait or run, once they are `wanted` or no more come: they are brought back one after the other."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    seen = -1
    try:
        while True:
            connection.request("GET", "/v1/queue", headers={"Authorization": f"Bearer {key}"})
            reply = connection.getresponse()
            told = json.loads(reply.read())
            if reply.status != 200:
                raise BenchError(f"GET /v1/queue: {reply.status} {told}")
            known = int(told["depth"]) + int(told["running"])
            if known in {wanted, seen}:
                return known
            seen = known
            time.sleep(_BEFORE_A_LOOK_SECONDS)
    finally:
        connection.close()


# ------------------------------------------------------------------------------------------------------------ job store


def database_in(directory: Path) -> Path:
    """The one SQLite file of a data directory."""
    found = [path for path in directory.iterdir() if path.is_file() and path.read_bytes()[:15] == b"SQLite format 3"]
    if len(found) != 1:
        raise BenchError(f"{len(found)} databases in {directory}: {sorted(path.name for path in directory.iterdir())}")
    return found[0]


def look(connection: sqlite3.Connection, file: Path) -> Look:
    """Look twice a while apart, until nothing moves: what was begun before is not to be held against what comes."""
    seen = None
    for _ in range(20):
        version = connection.execute("PRAGMA data_version").fetchone()[0]
        rows = {
            table: connection.execute(f'SELECT count(*) FROM "{table}"').fetchone()[0] for table in _tables(connection)
        }
        files = {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in _files_of(file)}
        now = Look(version, rows, files)
        if now == seen:
            return now
        seen = now
        time.sleep(_BEFORE_A_LOOK_SECONDS)
    raise BenchError("the job store is never at rest: something writes although nobody asks for anything")


def _files_of(file: Path) -> list[Path]:
    return [path for path in (file, file.with_name(f"{file.name}-wal")) if path.exists()]


def _tables(connection: sqlite3.Connection) -> list[str]:
    found = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%'")
    return [str(name) for (name,) in found]


def bare_inserts(source: Path, copy: Path, count: int) -> tuple[float, dict[str, int]]:
    """Write the same rows with the same indices into an empty file, a commit for each job; the seconds, and rows by table."""
    with contextlib.closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as there:
        full = {}
        for table in _tables(there):
            if len(rows := there.execute(f'SELECT * FROM "{table}"').fetchall()) >= count:
                full[table] = rows
        if not full:
            raise BenchError(f"no table of {source} has {count} rows")
        schema = [
            (str(table), str(sql))
            for table, sql in there.execute(
                "SELECT tbl_name, sql FROM sqlite_master WHERE sql NOT NULL ORDER BY type = 'index'"
            )
        ]
    with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as here:
        here.execute("PRAGMA journal_mode = WAL")
        here.execute("PRAGMA synchronous = FULL")
        for table, sql in schema:
            if table in full:
                here.execute(sql)
        inserts = {
            table: f'INSERT INTO "{table}" VALUES ({", ".join("?" * len(rows[0]))})' for table, rows in full.items()
        }
        begun = time.perf_counter()
        for index in range(count):
            here.execute("BEGIN IMMEDIATE")
            for table, rows in full.items():
                here.execute(inserts[table], rows[index])
            here.execute("COMMIT")
        return time.perf_counter() - begun, {table: len(rows) for table, rows in full.items()}


# -------------------------------------------------------------------------------------------------------------- measure


def configuration(directory: Path, key: str, jobs: int) -> str:
    """One backend that never answers, so that nothing but acceptance happens to jobs, and one that answers at once."""
    return f"""
[server]
data_dir = "{directory}/data"
drain_timeout_seconds = 1

[auth]
api_keys = ["{key}"]

[rate_limit]
enabled = false

[queue]
max_tasks = {2 * jobs}

[storage]
dir = "{directory}/images"

[logging]
level = "info"
format = "json"

[[backends]]
name = "slow"
protocol = "scripted"
models = ["slow"]
timeout_ms = 600000
max_concurrency = 4
[backends.scripted]
sequence = ["hang"]
models = ["slow"]

[[backends]]
name = "fast"
protocol = "scripted"
models = ["fast"]
[backends.scripted]
models = ["fast"]
"""


def measure(options: argparse.Namespace, directory: Path, cores: Cores, advance: Callable[[str], None]) -> Figures:
    key, port = new_key(), free_ports(1)[0]
    words = [sys.executable, "-m", "img_serving", "serve", "--host", "127.0.0.1", "--port", str(port), "--config"]
    command = f"{shlex.join(words)} {{config}}"

    def start() -> tuple[Program, float]:
        return start_gateway(directory, configuration(directory, key, options.jobs), port, cores.proxy, command=command)

    job = request_of("/v1/jobs", {"operation": "generation", "body": body_of("slow")}, key)
    plain = request_of("/v1/images/generations", body_of("fast"), key)
    advance("starting")
    program, _ = start()
    with program:
        advance(f"{options.jobs:,} jobs")
        accepted = asyncio.run(load(port, job, options.jobs, 202))
        _require_right(accepted, "jobs", program)
        file = database_in(directory / "data")
        with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True, isolation_level=None)) as second:
            asyncio.run(load(port, plain, CONNECTIONS, 200))  # what is made once, is made now
            before = look(second, file)
            advance(f"{options.plain:,} plain requests")
            synchronous = asyncio.run(load(port, plain, options.plain, 200))
            _require_right(synchronous, "plain requests", program)
            after = look(second, file)
            asyncio.run(load(port, job, 1, 202))
            after_a_job = look(second, file)
        advance("bare inserts of the same rows")
        bare_jobs = min(options.jobs, MOST_BARE)
        bare_seconds, tables = bare_inserts(file, directory / "bare.sqlite3", bare_jobs)
        advance("kill and start again")
        os.kill(program.pid, signal.SIGKILL)
    again, ready_seconds = start()
    with again:
        advance("counting the jobs")
        known = jobs_in_line(port, key, options.jobs + 1)
    return Figures(
        accepted=accepted,
        bare_jobs=bare_jobs,
        bare_seconds=bare_seconds,
        bare_tables=tables,
        plain=synchronous,
        before=before,
        after=after,
        after_a_job=after_a_job,
        ready_seconds=ready_seconds,
        known_after_kill=known,
    )


def _require_right(load: Load, what: str, program: Program) -> None:
    if load.errors:
        raise BenchError(f"{len(load.errors)} of {load.requests} {what} failed: {load.errors[0]}\n{program.tail(5)}")


# --------------------------------------------------------------------------------------------------------------- report


def table_of(figures: Figures) -> Table:
    table = Table(title=f"Durable jobs, {CONNECTIONS} connections")
    for heading in ("", "", "target", "verdict"):
        table.add_column(heading)

    def row(name: str, value: str, target: str = "", met: bool | None = None) -> None:
        table.add_row(name, value, target, "" if met is None else "[green]met[/]" if met else "[red]MISSED[/]")

    accepted, bare = figures.accepted, figures.bare_per_second
    row("accepted", f"{accepted.requests:,} in {accepted.seconds:.1f} s: {accepted.per_second:,.0f} jobs/s")
    row("until the 202", f"p50 {accepted.p50_ms:.1f} ms, p99 {accepted.p99_ms:.1f} ms")
    tables = ", ".join(figures.bare_tables)
    row(
        "bare inserts, a commit each",
        f"{figures.bare_jobs:,} in {figures.bare_seconds:.1f} s: {bare:,.0f} jobs/s ({tables})",
    )
    row("of the bare loop's speed", f"{figures.ratio:.2f}", f"≥ {TARGET_RATIO:g}", figures.ratio >= TARGET_RATIO)
    plain = figures.plain
    row("plain requests meanwhile", f"{plain.requests:,} in {plain.seconds:.1f} s, p50 {plain.p50_ms:.1f} ms")
    changed = _difference(figures.before, figures.after)
    row("what they wrote to the job store", changed or "nothing", "nothing", not changed)
    row("what one job writes to it", _difference(figures.after, figures.after_a_job) or "nothing", "something")
    row("ready after a kill -9, with all that", f"{figures.ready_seconds:.2f} s")
    wanted = accepted.requests + 1
    row("jobs known then", f"{figures.known_after_kill:,}", f"{wanted:,}", figures.known_after_kill == wanted)
    return table


def _difference(before: Look, after: Look) -> str:
    """What is not the same: commits, rows, files."""
    found = [] if before.version == after.version else ["commits"]
    found += [
        f"{after.rows[name] - count:+} rows of {name}"
        for name, count in before.rows.items()
        if after.rows[name] != count
    ]
    found += [f"{name} changed" for name, facts in before.files.items() if after.files.get(name) != facts]
    return ", ".join(found)


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
        "sqlite": sqlite3.sqlite_version,
        "commit": described.stdout.strip(),
    }


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar on standard error; elsewhere than on a terminal a line for each stage."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield lambda what: console.print(f"{time.strftime('%H:%M:%S')} {what}")
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as bar:
        task = bar.add_task("starting", total=STAGES)

        def advance(what: str) -> None:
            bar.update(task, description=what, advance=1)
            bar.refresh()

        yield advance


# -------------------------------------------------------------------------------------------------------------- program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", type=int, default=10_000, help="default 10000")
    parser.add_argument("--plain", type=int, default=1_000, help="plain requests (default 1000)")
    parser.add_argument("--quick", action="store_true", help="1000 jobs, 200 plain requests: only to see that it runs")
    parser.add_argument("--check", action="store_true", help="exit 1 when a target is missed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.jobs, options.plain = 1_000, 200
    if not 100 <= options.jobs <= 100_000 or not 32 <= options.plain <= 100_000:
        parser.error("--jobs is 100 to 100000, --plain 32 to 100000")
    return options


def run(options: argparse.Namespace, console: Console) -> int:
    cores = Cores.choose()
    about = machine(cores)
    os.sched_setaffinity(0, {cores.others})  # the clients stay out of the gateway's way
    with tempfile.TemporaryDirectory(prefix="img-serving-jobs-") as name, progress() as advance:
        figures = measure(options, Path(name), cores, advance)
    OUT.mkdir(exist_ok=True)
    file = OUT / time.strftime("jobs-%Y%m%d-%H%M%S.json")
    record = {
        "machine": about,
        **dataclasses.asdict(figures),
        "jobs_per_second": figures.accepted.per_second,
        "ratio": figures.ratio,
        "missed": figures.missed,
    }
    file.write_text(json.dumps(record, indent=1) + "\n")
    console.print(table_of(figures))
    console.print(f"all figures: {file.relative_to(OUT.parent.parent)}")
    verdict = f"verdict: MISSED {'; '.join(figures.missed)}" if figures.missed else "verdict: every target met"
    console.print(verdict, style="bold", markup=False)
    return int(options.check and bool(figures.missed))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    return to_an_end(lambda: run(options, console), console)


if __name__ == "__main__":
    sys.exit(main())
