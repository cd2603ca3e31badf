"""The programs of a soak: the upstream servers and the gateway, each a process of ours, started, killed and ended by its id."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from calls import Caller, NoAnswer

import img_serving

READY_SECONDS = 20.0
_SOURCE = str(Path(img_serving.__file__).resolve().parents[1])
_UPSTREAMS = Path(__file__).parent / "upstreams.py"
_TROUBLE = re.compile(r"Traceback|Task was destroyed|never retrieved|never awaited|\"level\":\s?\"error\"")


class SoakError(Exception):
    """Something went wrong that makes the figures void; the message says what to look at."""


def free_port() -> int:
    """A port below those that the system hands out by itself: still free after every kill."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ------------------------------------------------------------------------------------------------------------ upstreams


@dataclass(frozen=True)
class Said:
    """What an upstream server told: that it was asked for a picture, or that it has drawn some."""

    event: str
    server: str
    tag: str
    pictures: int
    at: float


class Upstreams:
    """The upstream servers' process, and everything it has said so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.ports: dict[str, int] = {}
        self.said: list[Said] = []
        self._ready = asyncio.Event()

    @property
    def drawing(self) -> int:
        """Calls that were begun and are not over."""
        events = [one.event for one in self.said]
        return events.count("asked") - events.count("drawn")

    def drawn(self, tag: str) -> int:
        """Pictures drawn for this tag, by whichever server."""
        return sum(one.pictures for one in self.said if one.event == "drawn" and one.tag == tag)

    async def read(self) -> None:
        """Take down what it says until it ends."""
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            told = json.loads(line)
            if told["event"] == "ready":
                self.ports = told["ports"]
                self._ready.set()
            else:
                self.said.append(Said(told["event"], told["server"], told["tag"], told.get("pictures", 0), told["at"]))

    async def ready(self) -> None:
        """Raises SoakError where they do not start."""
        try:
            async with asyncio.timeout(READY_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            raise SoakError("the upstream servers did not start") from None


@asynccontextmanager
async def upstreams(servers: Mapping[str, tuple[float, float]], seed: int) -> AsyncIterator[Upstreams]:
    """Servers by name, each with the least and the most seconds that a picture takes it; gone when the block is left."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(_UPSTREAMS),
        json.dumps({"seed": seed, "servers": servers}),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us: they end when their standard input does
    )
    running = Upstreams(process)
    reading = asyncio.create_task(running.read())
    try:
        await running.ready()
        yield running
    finally:
        await _end(process)
        await reading


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(5):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


# -------------------------------------------------------------------------------------------------------------- gateway


class Gateway:
    """`img-serving serve` in a directory of its own, on one port through all its deaths. Its output is in `log`."""

    def __init__(self, directory: Path, config: str, key: str) -> None:
        directory.mkdir(parents=True)
        (directory / "gateway.toml").write_text(config)
        self.directory = directory
        self.key = key
        self.port = free_port()
        self.log = directory / "gateway.out"
        self.process: asyncio.subprocess.Process | None = None

    @property
    def caller(self) -> Caller:
        return Caller(self.port, self.key)

    @property
    def data(self) -> Path:
        """What must survive a kill."""
        return self.directory / "data"

    @property
    def pictures(self) -> Path:
        return self.directory / "images"

    async def spawn(self) -> None:
        """Start it, and do not wait for anything."""
        # settings of whoever runs the soak must not reach the gateway under test
        environment = {name: value for name, value in os.environ.items() if not name.startswith("IMG_SERVING")}
        environment["PYTHONPATH"] = _SOURCE  # that which we run, wherever it is started from
        words = [
            "-m",
            "img_serving",
            "serve",
            "--config",
            "gateway.toml",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
        ]
        with self.log.open("ab") as output:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                *words,
                cwd=self.directory,
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def ready(self) -> float:
        """Wait until it accepts work; the seconds that took.

        Raises:
            SoakError: it ended, or takes too long.
        """
        begun = time.monotonic()
        while True:
            with contextlib.suppress(NoAnswer):
                if (await self.caller.get("/readyz")).status == 200:
                    return time.monotonic() - begun
            if self.process is None or self.process.returncode is not None:
                raise SoakError(f"the gateway ended by itself. The end of its output:\n{self.tail()}")
            if time.monotonic() - begun > READY_SECONDS:
                raise SoakError(f"the gateway is not ready after {READY_SECONDS:g} s:\n{self.tail()}")
            await asyncio.sleep(0.02)

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        await self._signal(signal.SIGKILL, 10)

    async def stop(self) -> int:
        """SIGTERM; the exit status."""
        return await self._signal(signal.SIGTERM, 30)

    async def _signal(self, number: int, patience_seconds: float) -> int:
        if self.process is None:
            return 0
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)
        try:
            async with asyncio.timeout(patience_seconds):
                return await self.process.wait()
        except TimeoutError:
            self.process.kill()
            return await self.process.wait()

    def tail(self, lines: int = 20) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def trouble(self) -> list[str]:
        """Lines of its log that no run should have."""
        lines = self.log.read_text(errors="replace").splitlines()
        return [line for line in lines if _TROUBLE.search(line)]


@asynccontextmanager
async def serving(directory: Path, config: str, key: str) -> AsyncIterator[Gateway]:
    """A gateway that is ready; it is killed at the end, where nobody stopped it before."""
    gateway = Gateway(directory, config, key)
    try:
        await gateway.spawn()
        await gateway.ready()
        yield gateway
    finally:
        if gateway.process is not None and gateway.process.returncode is None:
            await gateway.kill()


def head_of_config(key: str, *lines: str) -> str:
    """What every gateway of a soak is told; `lines` follow, as they are."""
    return "\n".join(
        [
            *("[auth]", f'api_keys = ["{key}"]', "[rate_limit]", "enabled = false"),
            *("[storage]", 'dir = "images"', "[logging]", 'level = "info"', 'format = "json"'),
            *lines,
            "",
        ]
    )


def backend(name: str, port: int, models: Sequence[str], **more: object) -> str:
    """The TOML of one OpenAI-compatible backend."""
    keys = {
        "name": name,
        "protocol": "openai",
        "endpoints": [f"http://127.0.0.1:{port}"],
        "models": list(models),
        "default_size": "32x32",
        **more,
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
    return "\n".join(["[[backends]]", *lines, "[backends.openai]", 'preset = "generic"', "edits = true", ""])


def new_key() -> str:
    return f"soak-{secrets.token_hex(20)}"
