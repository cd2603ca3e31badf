"""Where the gateway's CPU goes: py-spy samples its process tree while wrk loads it."""

from __future__ import annotations

import collections
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from processes import BenchError, on_core

if TYPE_CHECKING:
    from load import Case
    from proxy import Bench

_SECONDS = 8
# An idle thread of a pool, which py-spy takes for a busy one.
_WAITING = "_worker (concurrent/futures/thread.py"


def py_spy() -> str:
    """Path of py-spy, beside this Python or on PATH; empty if there is none."""
    return shutil.which("py-spy", path=str(Path(sys.executable).parent)) or shutil.which("py-spy") or ""


def profile(bench: Bench, case: Case, out: Path) -> str:
    """Sample one case; the functions that were on top most often, as text. The stacks stay in a file for a flame graph."""
    gateway = bench.proxies[-1]
    out.mkdir(exist_ok=True)
    stacks = out / f"stacks-{case.model}-c{case.connections}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    command = [
        py_spy(), "record", "--pid", str(gateway.program.pid), "--duration", str(_SECONDS - 2), "--rate", "200",
        "--format", "raw", "--subprocesses", "--function", "--output", str(stacks),
    ]  # fmt: skip
    with on_core(bench.cores.others):
        sampler = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    try:
        bench.turn(gateway, case, 0, _SECONDS)
        said, _ = sampler.communicate(timeout=60)
    finally:
        sampler.kill()
        sampler.wait()
    if sampler.returncode:
        raise BenchError(f"py-spy ended with status {sampler.returncode} (it may need root):\n{said}")
    return f"\n{case.label}, where samples were taken (all stacks: {stacks.name}):\n{_top(stacks.read_text())}"


def _top(stacks: str, lines: int = 20) -> str:
    """Functions by their share of the samples: running themselves, and running or waiting for something they called."""
    own: collections.Counter[str] = collections.Counter()
    below: collections.Counter[str] = collections.Counter()
    for line in stacks.splitlines():
        stack, _, count = line.rpartition(" ")
        frames = stack.split(";")
        if frames[-1].startswith(_WAITING):
            continue
        own[frames[-1]] += int(count)
        below.update(dict.fromkeys(frames, int(count)))
    total = sum(own.values()) or 1
    rows = (f"{count / total:6.1%} {below[frame] / total:7.1%}  {frame}" for frame, count in own.most_common(lines))
    return "\n".join(("   own   total  function", *rows))
