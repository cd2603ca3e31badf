"""One turn of load: wrk against one server, and what the server's processes spent on it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from processes import BenchError, Usage, on_core, usage
from servers import ROUTE, Reply, Target, upstream_counters

_SCRIPT = Path(__file__).parent / "wrk.lua"
_LONGEST_REST_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """One kind of reply at one number of connections."""

    model: str
    connections: int
    label: str


@dataclass(frozen=True)
class Turn:
    """What one proxy did in one turn. `errors` are wrk's own counts, by kind."""

    proxy: str
    case: str
    round: int
    requests: int
    seconds: float
    cpu_us_per_request: float
    cpu_busy: float
    requests_per_second: float
    p50_ms: float
    p99_ms: float
    bytes_per_request: float
    errors: Mapping[str, int]
    upstream_connections: int
    upstream_requests: int


def take_turn(
    wrk: str,
    target: Target,
    upstream: Target,
    reply: Reply,
    case: Case,
    *,
    round_: int,
    seconds: int,
    core: int,
    key: str,
    least_bytes: float,
) -> Turn:
    """Load one server for some seconds; raises BenchError where the figures would mean nothing.

    A turn whose replies have fewer than `least_bytes` on average counts as an error: something else was delivered.
    """
    command = [
        wrk, "-t1", f"-c{case.connections}", f"-d{seconds}s", "--timeout", "20s", "-s", str(_SCRIPT),
        f"http://127.0.0.1:{target.ports[case.model]}{ROUTE}",
    ]  # fmt: skip
    environment = {**os.environ, "BENCH_BODY": reply.request, "BENCH_KEY": key}
    accepted, answered = upstream_counters(upstream)
    before = usage(target.program.pid)
    with on_core(core):
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        output, _ = process.communicate(timeout=seconds + 60)
    except BaseException as error:
        process.kill()
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise BenchError(f"{target.name}, {case.label}: wrk did not end") from error
        raise
    cpu_seconds = before.seconds_until(_at_rest(target.program.pid))
    accepted_later, answered_later = upstream_counters(upstream)
    target.program.require_alive()
    figures = _figures(output, f"{target.name}, {case.label}")
    requests, elapsed = figures["requests"], figures["duration_us"] / 1e6
    if figures["bytes"] < requests * least_bytes:
        figures["errors"]["short on average"] = 1
    return Turn(
        proxy=target.name,
        case=case.label,
        round=round_,
        requests=requests,
        seconds=elapsed,
        cpu_us_per_request=cpu_seconds / requests * 1e6,
        cpu_busy=cpu_seconds / elapsed,
        requests_per_second=requests / elapsed,
        p50_ms=figures["p50_us"] / 1e3,
        p99_ms=figures["p99_us"] / 1e3,
        bytes_per_request=figures["bytes"] / requests,
        errors=figures["errors"],
        upstream_connections=accepted_later - accepted - 1,  # one of them was ours, to ask
        upstream_requests=answered_later - answered - 1,
    )


def _at_rest(pid: int) -> Usage:
    """Wait for the work on requests that wrk cut at the end: it belongs to this turn, and must not slow the next one."""
    deadline = time.monotonic() + _LONGEST_REST_SECONDS
    last = usage(pid)
    while time.monotonic() < deadline:
        time.sleep(0.1)
        now = usage(pid)
        if last.seconds_until(now) < 0.005:
            return now
        last = now
    return last


def _figures(output: str, where: str) -> dict:
    line = next((line for line in output.splitlines() if line.startswith("BENCH ")), None)
    if line is None:
        raise BenchError(f"{where}: wrk gave no figures:\n{output}")
    figures = json.loads(line.removeprefix("BENCH "))
    if not figures["requests"]:
        raise BenchError(f"{where}: not one request was answered; wrk counted {figures['errors']}")
    return figures
