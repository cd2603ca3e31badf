"""What the operating system knows of this process, under the names that every Prometheus dashboard expects."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from contextlib import suppress
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
    yield "max_fds", "gauge", "Most file descriptors that may be open.", _most_files()
    # not Linux, a /proc that shows less, or no descriptor left to read it with: each figure is told that can be
    with suppress(OSError, ValueError, IndexError):
        pages = [int(one) * os.sysconf("SC_PAGE_SIZE") for one in (proc / "self/statm").read_text().split()]
        yield "resident_memory_bytes", "gauge", "Bytes of main memory.", pages[1]
        yield "virtual_memory_bytes", "gauge", "Bytes of address space.", pages[0]
    with suppress(OSError, ValueError, IndexError, StopIteration):
        yield "start_time_seconds", "gauge", "When the process started, in Unix seconds.", _started_at(proc)
    opened = _open_files(proc)
    if opened is not None:
        yield "open_fds", "gauge", "Open file descriptors: connections, files, pipes.", opened


def _number(value: float) -> str:
    return "+Inf" if value == float("inf") else f"{value:.13g}"


def _started_at(proc: Path) -> float:
    fields = (proc / "self/stat").read_text().rpartition(")")[2].split()
    booted = next(line for line in (proc / "stat").read_text().splitlines() if line.startswith("btime "))
    return int(booted.split()[1]) + int(fields[_START_FIELD]) / os.sysconf("SC_CLK_TCK")


def _open_files(proc: Path) -> float | None:
    try:
        return len(list((proc / "self/fd").iterdir())) - 1  # the folder itself was open while it was read
    except OSError as error:
        # none is left to look with: then all of them are open
        return _most_files() if error.errno == errno.EMFILE else None


def _most_files() -> float:
    import resource  # noqa: PLC0415 - does not exist on every system, and only a scrape asks for it

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return float("inf") if soft == resource.RLIM_INFINITY else soft
