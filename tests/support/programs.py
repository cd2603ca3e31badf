"""Starts the real program and ends it, by its own process id."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

READY_SECONDS = 30.0


class Program:
    """A running `img-serving serve`."""

    def __init__(self, process: subprocess.Popen[str], directory: Path, url: str, said: str) -> None:
        self.process = process
        self.directory = directory
        self.url = url
        self.said = said
        found = re.search(r"admin API key \(shown once\): (\S+)", said)
        self.key = found.group(1) if found else None

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    @property
    def log(self) -> str:
        return (self.directory / "stderr.txt").read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=10)

    def stop(self, sig: int = signal.SIGTERM) -> int:
        self.process.send_signal(sig)
        return self.process.wait(timeout=30)


def to_an_end(process: subprocess.Popen[Any], seconds: float = 20.0) -> None:
    """Ask a program to end, and end it if it has not after that many seconds."""
    process.terminate()  # does nothing to one that has ended
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def free_port() -> int:
    """A port for what is started, stopped and started again: none of those that the system hands out in between."""
    while True:
        port = random.randrange(20_000, 30_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def serving(
    directory: Path, config: str = "", *, port: int = 0, environment: dict[str, str] | None = None
) -> Iterator[Program]:
    """Run the gateway in `directory` until the block ends."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(config)
    env = {key: value for key, value in os.environ.items() if not key.startswith("IMG_SERVING")}
    env.update(environment or {})
    with (directory / "stderr.txt").open("a") as stderr, (directory / "stdout.txt").open("w") as stdout:
        process = subprocess.Popen(
            [
                sys.executable, "-m", "img_serving", "serve", "--config", "config.toml",
                "--host", "127.0.0.1", "--port", str(port),
            ],
            cwd=directory, env=env, stdout=stdout, stderr=stderr, text=True,
        )  # fmt: skip
        try:
            yield Program(process, directory, *_wait(process, directory))
        finally:
            to_an_end(process)


def _wait(process: subprocess.Popen[str], directory: Path) -> tuple[str, str]:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until:
        said = (directory / "stdout.txt").read_text()
        found = re.search(r"listens on (http://\S+?:\d+)", said)
        if found and said.endswith("\n"):
            return found.group(1), said
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise AssertionError(f"the program did not start: {(directory / 'stderr.txt').read_text()}")


def openai_client(program: Program, **options: Any) -> Any:
    """The official client, pointed at the program."""
    import openai

    options.setdefault("api_key", program.key)
    return openai.OpenAI(base_url=f"{program.url}/v1", max_retries=0, **options)
