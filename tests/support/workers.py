"""Starts the real worker program and ends it, by its own process id."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.programs import to_an_end

READY_SECONDS = 60.0


class WorkerProgram:
    """A running `img-serving worker`; `said` are the lines until it was ready."""

    def __init__(self, process: subprocess.Popen[str], said: str) -> None:
        self.process = process
        self.said = said
        listens = re.search(r"listens on \S+:(\d+)", said)
        metrics = re.search(r"metrics: (\S+)", said)
        assert listens is not None, said
        self.port = int(listens.group(1))
        self.metrics_url = metrics.group(1) if metrics is not None else ""

    def metrics(self) -> dict[str, float]:
        """What its metrics page says, by name and labels, without the prefix."""
        with urllib.request.urlopen(self.metrics_url, timeout=5) as reply:  # noqa: S310 - our own
            lines = reply.read().decode().splitlines()
        pairs = (line.rpartition(" ") for line in lines if not line.startswith("#"))
        return {name.removeprefix("img_serving_worker_"): float(value) for name, _, value in pairs}

    def stop(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(timeout=30)


@contextmanager
def working(
    *arguments: str,
    port: int = 0,
    python: str = sys.executable,
    cwd: Path | None = None,
    until: str = "ready",
    **environment: str,
) -> Iterator[WorkerProgram]:
    """Run a worker until the block ends; when the block begins it has said `until`."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("IMG_SERVING")} | environment
    command = [python, "-m", "img_serving", "worker", "--port", str(port), "--metrics-port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env, cwd=cwd)
    try:
        assert process.stdout is not None
        said = ""
        for line in process.stdout:
            said += line
            if until in line:
                break
        assert until in said, f"it ended with {process.wait(10)}: {said}"
        yield WorkerProgram(process, said)
    finally:
        to_an_end(process)
        if process.stdout is not None:
            process.stdout.close()
