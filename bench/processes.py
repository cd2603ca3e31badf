"""Processes a benchmark starts: where they run, what they and their descendants cost, and how they end."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from rich.console import Console

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
# Ticks round every process to 10 ms; only a larger gap than this means that threads ended and took their schedstat along.
_ROUNDING_SECONDS = 0.05


class BenchError(Exception):
    """Something went wrong that makes the figures void; the message says what to look at."""


@dataclass(frozen=True)
class Cores:
    """The core of the program under test and the core of everything else; the same one on a machine with one core."""

    proxy: int
    others: int

    @classmethod
    def choose(cls) -> Cores:
        allowed = sorted(os.sched_getaffinity(0))
        return cls(allowed[0], allowed[1] if len(allowed) > 1 else allowed[0])

    @property
    def shared(self) -> bool:
        return self.proxy == self.others


@dataclass(frozen=True)
class Usage:
    """The CPU time of a process tree up to one moment, counted in both ways that Linux offers."""

    thread_ns: Mapping[tuple[int, int], int]
    tick_seconds: float

    def seconds_until(self, later: Usage) -> float:
        """CPU seconds between two pictures: per-thread nanoseconds, or process ticks where threads have come and gone."""
        exact = sum(ns - self.thread_ns.get(thread, 0) for thread, ns in later.thread_ns.items()) / 1e9
        ticks = later.tick_seconds - self.tick_seconds
        no_schedstat = not any(later.thread_ns.values())  # a kernel built without it
        return ticks if no_schedstat or ticks - exact > _ROUNDING_SECONDS else exact


def free_ports(count: int) -> list[int]:
    """Ports on 127.0.0.1 that nobody listens on, all different."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def allow_many_connections() -> None:
    """Raise our own limit of open files, which every program we start inherits: c = 256 needs two sockets a request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(65536, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def to_an_end(run: Callable[[], int], console: Console) -> int:
    """The exit status of a benchmark, which leaves no process behind, however it is ended."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` runs
    allow_many_connections()
    try:
        return run()
    except KeyboardInterrupt:
        console.print("interrupted; everything that was started has been ended")
        return 130
    except BenchError as error:
        console.print(f"ERROR {error}", style="red", markup=False)
        return 1


@contextlib.contextmanager
def on_core(core: int) -> Iterator[None]:
    """Whatever is started inside runs on that core, with all its future children."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def descendants(root: int) -> list[int]:
    """The process and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    tree = [root]
    for pid in tree:  # grows while it is walked
        tree.extend(children.get(pid, ()))
    return tree


def usage(root: int) -> Usage:
    """CPU time of the process and all its descendants, children that were already waited for included."""
    thread_ns: dict[tuple[int, int], int] = {}
    ticks = 0
    for pid in descendants(root):
        if fields := _stat(pid):
            ticks += sum(int(field) for field in fields[11:15])  # utime, stime, cutime, cstime
        with contextlib.suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):
                    thread_ns[pid, int(thread.name)] = int((thread / "schedstat").read_text().split()[0])
    return Usage(thread_ns, ticks / _TICKS_PER_SECOND)


def rss_bytes(root: int) -> int:
    """Resident memory of the process and all its descendants; pages they share are counted once for each."""
    return sum(_memory(pid, "VmRSS") for pid in descendants(root))


def peak_rss_bytes(root: int) -> int:
    """The sum of the highest resident sizes that each living process of the tree has ever had."""
    return sum(_memory(pid, "VmHWM") for pid in descendants(root))


class Program:
    """One program that we started, pinned to a core, its output in a file; leaving the `with` ends it and all below it."""

    def __init__(
        self,
        name: str,
        command: Sequence[str | os.PathLike[str]],
        *,
        core: int,
        directory: Path,
        environment: Mapping[str, str] | None = None,
        patience_seconds: float = 20,
    ) -> None:
        self.name = name
        self.log = directory / f"{name}.out"
        self._patience_seconds = patience_seconds
        with self.log.open("ab") as output, on_core(core):
            self._process = subprocess.Popen(
                command, cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def require_alive(self) -> None:
        """Raise with the end of the program's own output if it is gone."""
        if (status := self._process.poll()) is not None:
            raise BenchError(f"{self.name} ended with status {status}. The end of its output:\n{self.tail()}")

    def tail(self, lines: int = 20) -> str:
        with self.log.open("rb") as output:
            output.seek(max(0, self.log.stat().st_size - 64 * 1024))  # an access log grows to gigabytes
            return "\n".join(output.read().decode(errors="replace").splitlines()[-lines:]) or "(none)"

    def stop(self) -> None:
        """SIGTERM, then SIGKILL to whatever of its tree is still there; only ever processes seen below this one."""
        family = {pid: _started_at(pid) for pid in descendants(self.pid)}
        try:
            if self._process.poll() is None:
                self._process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(self._patience_seconds)
        finally:  # also when somebody loses patience earlier and presses Ctrl-C once more
            for pid, started_at in family.items():
                if started_at is not None and _started_at(pid) == started_at:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._process.wait()


def wait_until(
    answers: Callable[[], bool], program: Program, what: str, *, timeout_seconds: float, every_seconds: float
) -> float:
    """Ask `answers()` until it is true; the seconds that took. Raises BenchError if the program ends or time runs out."""
    begun = time.monotonic()
    while True:
        if answers():
            return time.monotonic() - begun
        program.require_alive()
        if time.monotonic() - begun > timeout_seconds:
            raise BenchError(
                f"{program.name}: no {what} in {timeout_seconds:.0f} s. The end of its output:\n{program.tail()}"
            )
        time.sleep(every_seconds)


def _stat(pid: int) -> list[str]:
    """/proc/<pid>/stat from the state on (the name before it may hold anything), empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started_at(pid: int) -> str | None:
    fields = _stat(pid)
    return fields[19] if fields and fields[0] != "Z" else None


def _memory(pid: int, field: str) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)
