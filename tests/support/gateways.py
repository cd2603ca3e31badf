"""A whole gateway in process: real parts, scripted backends, state and pictures in memory."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from random import Random
from typing import Any

from img_serving.config import Config, load
from img_serving.main import Gateway, build
from img_serving.policy.api_keys import digest_of
from img_serving.ports import ArtifactStore, State
from img_serving.state.memory import MemoryState
from img_serving.storage.memory import MemoryStore
from img_serving.telemetry.logs import RequestLog
from tests.support.asgi import Client

ADMIN = "sk-admin-key"


def config_of(toml: str = "", **environment: str) -> Config:
    """A configuration from TOML text."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.toml"
        path.write_text(toml)
        return load(path, environment).config


def scripted(name: str, **script: Any) -> str:
    """The TOML of a scripted backend; `backend__KEY` sets a key of the backend itself."""
    import json

    own = {key.removeprefix("backend__"): script.pop(key) for key in list(script) if key.startswith("backend__")}
    lines = ["[[backends]]", f'name = "{name}"', 'protocol = "scripted"']
    lines += [f"{key} = {json.dumps(value)}" for key, value in own.items()]
    lines += ["[backends.scripted]", *(f"{key} = {json.dumps(value)}" for key, value in script.items())]
    return "\n".join(lines) + "\n"


class Harness:
    """A running gateway and a client with the admin key."""

    def __init__(self, gateway: Gateway, log_fd: int) -> None:
        self.gateway = gateway
        self.client = Client(gateway.app, ADMIN)
        self.nobody = Client(gateway.app)
        self.log_fd = log_fd

    def log_lines(self) -> list[dict[str, Any]]:
        """The request log so far."""
        import json

        self.gateway.request_log.flush()
        size = os.fstat(self.log_fd).st_size
        return [json.loads(line) for line in os.pread(self.log_fd, size, 0).splitlines()]

    def adapter(self, backend: str, index: int = 0) -> Any:
        entry = self.gateway.registry._entries[backend]
        return entry.endpoints[index].adapter

    def endpoint(self, backend: str, index: int = 0) -> Any:
        return self.gateway.registry._entries[backend].endpoints[index].state


def wall_clock() -> Callable[[], float]:
    """Unix seconds that jump when the running loop's clock does."""
    loop = asyncio.get_running_loop()
    began = time.time() - loop.time()
    return lambda: began + loop.time()


@asynccontextmanager
async def running(
    toml: str = "",
    *,
    state: State | None = None,
    store: ArtifactStore | None = None,
    spool: ArtifactStore | None = None,
) -> AsyncIterator[Harness]:
    """Bring a gateway up and down around a test."""
    config = config_of(toml)
    loop = asyncio.get_running_loop()
    state = state if state is not None else MemoryState(clock=wall_clock())
    store = store if store is not None else MemoryStore()
    await state.open()
    await store.prepare()
    log_fd = os.memfd_create("request-log")
    gateway = await build(
        config,
        state=state,
        store=store,
        key_hashes=[digest_of(ADMIN)],
        request_log=RequestLog(log_fd, "json"),
        config_file="test.toml",
        rng=Random(7),
        clock=loop.time,
        unix_clock=wall_clock(),
        spool=spool,
    )
    await gateway.start()
    try:
        yield Harness(gateway, log_fd)
    finally:
        await gateway.stop()
        os.close(log_fd)
