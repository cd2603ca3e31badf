"""What the operating system knows of this process, under the names that every Prometheus dashboard expects."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROC: Final = Path("/proc")

_START_FIELD: Final = 19
"""Of /proc/self/stat behind the program's name, which may hold blanks: field 22, the start in clock ticks since boot."""


def render_process(proc: Path = PROC) -> bytes:
    """The Prometheus text of `process_…`; what this system does not tell is left out."""
    lines: list[str] = []
    for name, kind, text, value in _measured(proc):
        lines += (f"# HELP process_{name} {text}", f"# TYPE process_{name} {kind}", f"process_{name} {_number(value)}")
    return ("\n".join(lines) + "\n").encode()


def _measured(proc: Path) -> Iterator[tuple[str, str, str, float]]:
    yield "cpu_seconds_total", "counter", "Seconds of processor time, of user and system.", time.process_time()
    try:
        pages = (proc / "self/statm").read_text().split()
        started = _started_at(proc)
        opened = len(list((proc / "self/fd").iterdir())) - 1  # the folder itself was open while it was read
    except (OSError, ValueError, IndexError, StopIteration):  # not Linux, or a /proc that shows less
        return
    page_bytes = os.sysconf("SC_PAGE_SIZE")
    yield "resident_memory_bytes", "gauge", "Bytes of main memory.", int(pages[1]) * page_bytes
    yield "virtual_memory_bytes", "gauge", "Bytes of address space.", int(pages[0]) * page_bytes
    yield "start_time_seconds", "gauge", "When the process started, in Unix seconds.", started
    yield "open_fds", "gauge", "Open file descriptors: connections, files, pipes.", opened
    yield "max_fds", "gauge", "Most file descriptors that may be open.", _most_files()


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else f"{value:.13g}"


def _started_at(proc: Path) -> float:
    fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
    booted = next(line for line in (proc / "stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted.split()[1]) + int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")


def _most_files() -> float:
    import resource  # noqa: PLC0415 - does not exist on every system, and only a scrape asks for it

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft
