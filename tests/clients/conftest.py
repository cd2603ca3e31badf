"""The official clients, where `scripts/official-clients` has made their environments, and the servers that they call."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from tests.clients.rehearsal import CLIENTS, KEY, REHEARSAL, UNBREAKABLE, backend, environment
from tests.support.official_clients import VARIABLE, OfficialClient, Told
from tests.support.programs import Program, serving


class Clients:
    """All of them: each process is started when it is wanted first."""

    def __init__(self, folder: Path, directory: Path) -> None:
        """`folder` has the environments, `directory` is for what the processes have to complain about."""
        self._folder = folder
        self._directory = directory
        self._running: dict[str, OfficialClient] = {}

    @property
    def present(self) -> list[str]:
        """The names of those that are here."""
        return [name for name in CLIENTS if (self._folder / name).exists()]

    def get(self, name: str) -> OfficialClient:
        """The client of this name; the test is skipped where there is none, saying why."""
        if name not in self.present:
            # neither here nor known to be missing: the script broke, which must not pass for a skip
            pytest.skip(f"{name} is not here: {(self._folder / f'{name}.missing').read_text().strip()}")
        if name not in self._running:
            self._running[name] = OfficialClient(name, self._folder / name, self._directory)
        return self._running[name]

    def at_once(self, call: Callable[[OfficialClient], Told]) -> dict[str, Told]:
        """What each client says to a call that takes its time: all that are here make it at the same time."""
        clients = [self.get(name) for name in self.present]
        with ThreadPoolExecutor(len(CLIENTS)) as pool:
            return dict(zip((one.name for one in clients), pool.map(call, clients), strict=True))

    def close(self) -> None:
        for one in self._running.values():
            one.close()


@pytest.fixture(scope="session")
def clients(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clients]:
    with closing(Clients(Path(os.environ[VARIABLE]), tmp_path_factory.mktemp("clients"))) as clients:
        yield clients


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, clients: Clients) -> OfficialClient:
    return clients.get(request.param)


@pytest.fixture(params=[name for name in CLIENTS if name.startswith("python")])
def python_client(request: pytest.FixtureRequest, clients: Clients) -> OfficialClient:
    return clients.get(request.param)


@pytest.fixture(scope="session")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """As it is shipped: the built-in backend draws. The key comes from the environment."""
    with serving(tmp_path_factory.mktemp("gateway"), environment=environment()) as program:
        program.key = KEY
        yield program


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """One whose models are named after what happens to those who ask for them."""
    with serving(tmp_path_factory.mktemp("rehearsal"), REHEARSAL) as program:
        program.key = KEY
        yield program


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """Its backends take three seconds, and draw one picture in their life: two for each client."""
    config = UNBREAKABLE + "".join(
        backend(f"{use}-{name}", latency_seconds=3, sequence=["ok", "fail"], repeat="last")
        for use in ("retry", "order")
        for name in CLIENTS
    )
    with serving(tmp_path_factory.mktemp("once"), config, environment=environment()) as program:
        yield program
