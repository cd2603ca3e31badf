"""The gateway under test in the fault bench: started, looked at from outside (metrics, sockets, log), and stopped."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults_fleet import Server
from faults_load import Client
from processes import BenchError, free_ports, on_core
from servers import GATEWAY

_READY_SECONDS = 30.0
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_TROUBLE = re.compile(r"Traceback|Task was destroyed|never retrieved|never awaited|\"level\":\s?\"error\"")
_ATTEMPT = re.compile(r'"event":"attempt (\w+:) \w+: (?:127\.0\.0\.1:\d+: )?([^"\\]*)')
# States as /proc/net/tcp names them.
_CLOSE_WAIT, _LISTEN = "08", "0A"


@dataclass(frozen=True)
class BackendPlan:
    """One backend of the configuration; its model has its name."""

    name: str
    protocol: str
    servers: Sequence[Server]
    max_concurrency: int = 32
    timeout_ms: int = 2000

    def __str__(self) -> str:
        return f"""
[[backends]]
name = "{self.name}"
protocol = "{self.protocol}"
endpoints = {json.dumps([server.url for server in self.servers])}
models = ["{self.name}"]
timeout_ms = {self.timeout_ms}
max_concurrency = {self.max_concurrency}
"""


class Metrics:
    """One reading of /metrics."""

    def __init__(self, text: str) -> None:
        self._values: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        for line in text.splitlines():
            if line.startswith("#") or not line:
                continue
            name, _, value = line.rpartition(" ")
            name, _, labels = name.partition("{")
            self._values[name.removeprefix("img_serving_"), frozenset(_LABEL.findall(labels))] = float(value)

    def total(self, name: str, **labels: str) -> float:
        """The sum of a metric's values, of those with these labels."""
        wanted = labels.items()
        return sum(value for (its, has), value in self._values.items() if its == name and wanted <= has)

    def of_endpoint(self, name: str, url: str) -> float:
        """A gauge of one endpoint."""
        return self.total(name, endpoint=url)


@dataclass(frozen=True)
class Sockets:
    """The open files of the gateway: connections by whom they are to, those their peer has closed, and all else."""

    clients: int
    upstream: Mapping[int, int]
    left_open: int
    other: int

    def __str__(self) -> str:
        return f"{sum(self.upstream.values())} upstream, {self.clients} client, {self.other} other"


class Gateway:
    """A running `img-serving serve`."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, log: Path, client: Client) -> None:
        self.process = process
        self.port = port
        self.log = log
        self.asker = client
        self._seen_bytes = 0

    async def metrics(self) -> Metrics:
        return Metrics((await self.asker.get("/metrics")).decode())

    def sockets(self, fleet_ports: Sequence[int]) -> Sockets:
        """Look at every open file of the process."""
        inodes, other = set(), 0
        for entry in Path(f"/proc/{self.process.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                where = str(entry.readlink())
                if where.startswith("socket:["):
                    inodes.add(where[8:-1])
                else:
                    other += 1
        clients = left_open = 0
        upstream: collections.Counter[int] = collections.Counter()
        for inode, state, ours, theirs in _tcp(self.process.pid):
            if inode not in inodes:
                continue
            inodes.remove(inode)
            left_open += state == _CLOSE_WAIT
            if state == _LISTEN:
                other += 1
            elif ours == self.port:
                clients += 1
            elif theirs in fleet_ports:
                upstream[theirs] += 1
            else:
                other += 1
        return Sockets(clients, dict(upstream), left_open, other + len(inodes))

    def news(self) -> tuple[list[str], dict[str, int]]:
        """The log since the last look: what no run should have, and what became of attempts that went wrong, counted."""
        with self.log.open("rb") as file:
            file.seek(self._seen_bytes)
            text = file.read()
        self._seen_bytes += len(text)
        lines = text.decode(errors="replace").splitlines()
        found = [line for line in lines if _TROUBLE.search(line)]
        trouble = [f"{len(found)} bad lines in the log, the first: {found[0][:1500]}"] if found else []
        attempts = collections.Counter(" ".join(said.groups()) for line in lines if (said := _ATTEMPT.search(line)))
        return trouble, dict(attempts)

    def lines_of(self, request_ids: set[str]) -> dict[str, list[str]]:
        """What the log tells of some requests, in few words."""
        found: dict[str, list[str]] = {}
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                if (request_id := entry.get("request_id")) in request_ids:
                    event = entry.get("event", "")
                    more = f" status={entry['status']} attempts={entry.get('attempts')}" if "status" in entry else ""
                    found.setdefault(request_id, []).append(f"{entry.get('ts')} {event}{more}")
        return found

    async def stop(self, *, again_after: float | None = None, patience_seconds: float = 40.0) -> tuple[float, int]:
        """SIGTERM, and maybe a second one; seconds from the last signal to the end, and the exit status (-9: killed)."""
        self.process.send_signal(signal.SIGTERM)
        if again_after is not None:
            await asyncio.sleep(again_after)
            if self.process.returncode is None:
                self.process.send_signal(signal.SIGTERM)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(patience_seconds):
                status = await self.process.wait()
        except TimeoutError:
            self.process.kill()
            status = await self.process.wait()
        return time.monotonic() - begun, status


@contextlib.asynccontextmanager
async def running(
    directory: Path, key: str, plans: Sequence[BackendPlan], *, core: int, drain_seconds: float = 15.0
) -> AsyncIterator[Gateway]:
    """The gateway in front of these backends, ready; it is ended when the block is left."""
    config = f"""
[server]
data_dir = "{directory}/data"
drain_timeout_seconds = {drain_seconds:g}

[auth]
api_keys = ["{key}"]

[rate_limit]
enabled = false

[storage]
dir = "{directory}/images"

[logging]
level = "info"
format = "json"
{"".join(map(str, plans))}"""
    log = directory / "gateway.out"
    _write(directory / "gateway.toml", config)
    port = free_ports(1)[0]
    # Settings of whoever runs the benchmark must not reach the gateway under test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMG_SERVING")}
    words = [str(GATEWAY), "serve", "--config", "gateway.toml", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output, on_core(core):
        process = await asyncio.create_subprocess_exec(
            *words, cwd=directory, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output
        )
    gateway = Gateway(process, port, log, Client(port, key, "nobody"))
    try:
        await _until_ready(gateway)
        yield gateway
    finally:
        if process.returncode is None:
            await gateway.stop()


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True)
    file.write_text(text)


async def _until_ready(gateway: Gateway) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        with contextlib.suppress(OSError):
            if b'"ok"' in await gateway.asker.get("/readyz"):
                return
        if gateway.process.returncode is not None or time.monotonic() > deadline:
            said = gateway.log.read_text(errors="replace")[-3000:]
            raise BenchError(f"the gateway did not start. The end of its output:\n{said}")
        await asyncio.sleep(0.05)


def _tcp(pid: int) -> Iterator[tuple[str, str, int, int]]:
    """Inode, state, our port and theirs of every TCP socket that the process could see."""
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        yield fields[9], fields[3], int(fields[1].rpartition(":")[2], 16), int(fields[2].rpartition(":")[2], 16)
