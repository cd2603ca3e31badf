"""What a service manager hears, at a real socket: from the class alone, and from the real program."""

from __future__ import annotations

import http.client
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.programs import serving

from img_serving.telemetry.service_manager import ServiceManager


@contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(30)
        yield manager


@pytest.fixture
def path() -> Iterator[str]:
    """Short: a Unix socket's address has 108 bytes at most."""
    with tempfile.TemporaryDirectory() as directory:
        yield f"{directory}/notify"


def heard(manager: socket.socket) -> list[str]:
    return manager.recv(4096).decode().split("\n")


def is_silent(manager: socket.socket) -> bool:
    """Everything here is sent before the sender goes on: what is not there now was not sent."""
    manager.setblocking(False)
    try:
        manager.recv(4096)
    except BlockingIOError:
        return True
    return False


@pytest.mark.parametrize("is_abstract", [False, True])
def test_it_is_told_at_the_address_in_the_environment(path: str, is_abstract: bool) -> None:
    name = f"@img-serving-{os.getpid()}" if is_abstract else path
    with listening(name.replace("@", "\0") if is_abstract else path) as manager:
        told = ServiceManager({"NOTIFY_SOCKET": name})
        told.ready("listens")
        told.stopping()
        assert heard(manager) == ["READY=1", "STATUS=listens"]
        assert heard(manager)[0] == "STOPPING=1"


@pytest.mark.parametrize("environ", [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "vsock:2:9"}, {"WATCHDOG_USEC": "5"}])
def test_without_an_address_nothing_is_sent(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    manager = ServiceManager(environ)
    manager.ready("listens")
    manager.beat(1.0)
    manager.stopping()
    assert not caplog.records


def test_the_watchdog_is_told_twice_in_its_time(path: str) -> None:
    with listening(path) as manager:
        told = ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "60000000", "WATCHDOG_PID": str(os.getpid())})
        for now in (100.0, 100.1, 129.9, 130.0, 130.1, 160.0):
            told.beat(now)
        assert [heard(manager) for _ in range(3)] == [["WATCHDOG=1"]] * 3
        assert is_silent(manager)


def test_a_manager_that_does_not_read_is_told_of_once_and_not_waited_for(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    with listening(path) as manager:
        told = ServiceManager({"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "2000000"})
        began = time.monotonic()
        for now in range(100):
            told.beat(float(now))
        assert time.monotonic() - began < 5  # a tenth of a second for each that is not heard would be more
        assert [record.getMessage()[:40] for record in caplog.records] == ["the service manager does not hear us (WA"]
        heard(manager)
        told.beat(1000.0)  # there is room again, and then there is not
        told.beat(2000.0)
        assert len(caplog.records) == 2


@pytest.mark.parametrize(
    "watchdog",
    [
        {},
        {"WATCHDOG_USEC": "0"},
        {"WATCHDOG_USEC": "9" * 400},
        {"WATCHDOG_USEC": "9" * 5000},
        {"WATCHDOG_USEC": "x"},
        {"WATCHDOG_USEC": "9", "WATCHDOG_PID": "1"},
    ],
)
def test_a_watchdog_that_is_off_or_somebody_elses_is_not_told(path: str, watchdog: dict[str, str]) -> None:
    with listening(path) as manager:
        ServiceManager({"NOTIFY_SOCKET": path, **watchdog}).beat(1.0)
        assert is_silent(manager)


def test_a_manager_that_is_gone_is_logged_and_does_no_harm(path: str, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({"NOTIFY_SOCKET": path}).ready("listens")
    assert "READY=1" in caplog.text


@pytest.mark.smoke
def test_ready_means_that_requests_are_answered_and_the_end_is_told(path: str, tmp_path: Path) -> None:
    environment = {"NOTIFY_SOCKET": path, "WATCHDOG_USEC": "1000000"}
    with listening(path) as manager, serving(tmp_path, environment=environment) as program:
        ready, status = heard(manager)
        assert ready == "READY=1"
        assert status == f"STATUS=listens on 127.0.0.1 port {program.port}"
        connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        connection.close()
        assert [heard(manager) for _ in range(3)] == [["WATCHDOG=1"]] * 3
        assert program.stop() == 0
        rest = [heard(manager)]
        while rest[-1] == ["WATCHDOG=1"]:
            rest.append(heard(manager))
        assert rest[-1][0] == "STOPPING=1"


@pytest.mark.smoke
def test_a_gateway_that_cannot_start_is_never_ready(path: str, tmp_path: Path) -> None:
    with listening(path) as manager, socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = serving(tmp_path, port=port, environment={"NOTIFY_SOCKET": path})
        with pytest.raises(AssertionError, match="did not start"), program:
            pass
        assert is_silent(manager)
