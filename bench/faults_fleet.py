"""The upstream servers of the fault bench: one process each, what may be done to them, and every call that reached them."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from processes import BenchError, free_ports, on_core

_WORKER = Path(__file__).parent / "faults_server.py"
_PATIENCE_SECONDS = 20.0


@dataclass(slots=True, eq=False)
class UpstreamCall:
    """One POST that a server received. `left`: whoever asked closed the connection before the answer."""

    server: int
    request_id: str
    pictures: int
    started_at: float
    ended_at: float | None = None
    left: bool = False

    def __str__(self) -> str:
        if self.ended_at is None:
            return f"server {self.server} (never over)"
        how = "the gateway left" if self.left else "over"
        return f"server {self.server} ({how} after {self.ended_at - self.started_at:.2f} s)"


class Server:
    """One upstream server process. It keeps its port and its number through all deaths."""

    def __init__(self, number: int, port: int, script: Mapping[str, Any], core: int) -> None:
        self.number = number
        self.port = port
        self.script = dict(script)
        self.calls: list[UpstreamCall] = []
        self._core = core
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._open: dict[int, UpstreamCall] = {}
        self._done: asyncio.Queue[None] = asyncio.Queue()
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return f"<Server {self.number}: {len(self.calls)} calls>"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        """Start the process and wait until it listens."""
        with on_core(self._core):
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                str(_WORKER),
                str(self.port),
                json.dumps(self.script),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for us: they end when their standard input does
            )
        self._reading = asyncio.create_task(self._read(self._process))
        await self._acknowledged()

    async def follow(self, **script: object) -> None:
        """Change the script, but for what it said of latency and faces at the start."""
        await self._order({"do": "follow", "script": {**self.script, **script}})

    async def shut(self) -> None:
        """Stop listening and cut all connections; the process stays."""
        await self._order({"do": "stop"})

    async def open(self) -> None:
        """Listen again."""
        await self._order({"do": "start"})

    def freeze(self) -> None:
        """Stop the process where it stands: the kernel still accepts connections for it, and nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def shoot(self) -> None:
        """SIGKILL, and do not wait: several can die at one moment."""
        self._signal(signal.SIGKILL)

    async def kill(self) -> None:
        """SIGKILL, and wait until the process is gone."""
        if self._process is None or self._reading is None:
            return
        self.shoot()
        await self._process.wait()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._process = None

    async def call_of(self, request_id: str, *, over: bool = False) -> UpstreamCall:
        """Wait for the call of a request, or for its end."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            for call in reversed(self.calls):
                if call.request_id == request_id and (call.ended_at is not None or not over):
                    return call
            self._news.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._news.wait()
            except TimeoutError:
                what = "the end of the call" if over else "the call"
                raise BenchError(f"server {self.number} did not see {what} of {request_id}") from None

    def _signal(self, number: int) -> None:
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _order(self, order: Mapping[str, object]) -> None:
        if self._process is None or self._process.stdin is None:
            raise BenchError(f"server {self.number} is not running")
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        await self._acknowledged()

    async def _acknowledged(self) -> None:
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                await self._done.get()
        except TimeoutError:
            raise BenchError(f"server {self.number} did not do what it was told") from None

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while line := await process.stdout.readline():
            said = json.loads(line)
            match said["event"]:
                case "came":
                    call = UpstreamCall(self.number, said["request_id"], said["pictures"], said["at"])
                    self.calls.append(call)
                    self._open[said["call"]] = call
                case "over":
                    call = self._open.pop(said["call"])
                    call.ended_at, call.left = said["at"], said["left"]
                case "done":
                    self._done.put_nowait(None)
            self._news.set()
        for call in self._open.values():  # it died with them
            call.ended_at = time.monotonic()
        self._open.clear()
        self._news.set()


@dataclass
class Fleet:
    """All servers that are up, by their purpose; leaving the `async with` ends every one of them."""

    core: int
    servers: list[Server] = field(default_factory=list)

    async def add(self, scripts: Iterable[Mapping[str, Any]]) -> Sequence[Server]:
        """Start one server a script."""
        given = list(scripts)
        first = len(self.servers)
        made = [
            Server(first + index, port, script, self.core)
            for index, (port, script) in enumerate(zip(free_ports(len(given)), given, strict=True))
        ]
        self.servers += made
        for server in made:
            await server.start()
        return made

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        # first all, without waiting: whoever interrupts us may not let us wait, and a frozen one does not end by itself
        for server in self.servers:
            server.shoot()
        for server in self.servers:
            await server.kill()


def calls_since(servers: Iterable[Server], moment: float) -> list[UpstreamCall]:
    """The calls that came to any of the servers after a moment, in their order."""
    found = [call for server in servers for call in server.calls if call.started_at >= moment]
    return sorted(found, key=lambda call: call.started_at)
