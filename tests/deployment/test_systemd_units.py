"""The units in deploy/systemd: systemd finds no fault with them, and what they start serves and ends as they say."""

from __future__ import annotations

import http.client
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.programs import free_port

from img_serving.cli.endings import MISUSED
from img_serving.config import Config

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "deploy" / "systemd"
GUIDE = ROOT / "docs" / "deployment" / "bare-metal.md"
PROGRAM = "/opt/img-serving/bin/img-serving"
SETTINGS = "/etc/img-serving"
STATE = "/var/lib/img-serving"
KEY = "sk-in-the-environment-file"

EXPOSURE = {"img-serving.service": 15, "img-serving-worker@.service": 40}
"""Tenths of what `systemd-analyze security` may say; systemd 252 says 1.2 and 3.6, others weigh a little differently."""


class Unit:
    """A unit file, read as far as ours need it: `Key=value` lines, those of one key in their order."""

    def __init__(self, name: str) -> None:
        self.text = (UNITS / name).read_text()
        self._lines = [line.partition("=") for line in self.text.splitlines() if re.match(r"[A-Za-z]+=", line)]

    def all(self, key: str) -> list[str]:
        return [value for name, _, value in self._lines if name == key]

    def one(self, key: str) -> str:
        (value,) = self.all(key)
        return value


@pytest.fixture(scope="module")
def unit() -> Unit:
    return Unit("img-serving.service")


def analyze(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("systemd-analyze")
    if program is None:
        pytest.skip("NO SYSTEMD: systemd-analyze is not installed")
    return subprocess.run([program, *arguments], check=False, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("name", EXPOSURE)
def test_systemd_finds_no_fault(name: str, tmp_path: Path) -> None:
    program = tmp_path / "img-serving"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    copy = tmp_path / name.replace("@", "@first")
    copy.write_text((UNITS / name).read_text().replace(PROGRAM, str(program)))
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(copy))
    about_us = [line for line in (done.stdout + done.stderr).splitlines() if "img-serving" in line]
    assert (done.returncode, about_us) == (0, [])


def test_systemd_would_find_a_fault(tmp_path: Path) -> None:
    copy = tmp_path / "img-serving.service"
    copy.write_text(
        (UNITS / "img-serving.service").read_text().replace(PROGRAM, "/bin/true").replace("KillMode", "KilMode")
    )
    done = analyze("verify", "--man=no", "--recursive-errors=no", str(copy))
    assert "KilMode" in done.stdout + done.stderr


@pytest.mark.parametrize(("name", "tenths"), EXPOSURE.items())
def test_what_a_service_may_do_is_little(name: str, tenths: int) -> None:
    done = analyze("security", "--offline=true", f"--threshold={tenths}", "--no-pager", str(UNITS / name))
    if "unrecognized option" in done.stderr or "Unknown operation" in done.stderr:
        pytest.skip("NO SYSTEMD: this version cannot weigh a unit that is not installed")
    assert done.returncode == 0, done.stdout[-300:] + done.stderr
    assert "exposure level" in done.stdout


def test_systemd_waits_for_longer_than_draining_takes(unit: Unit) -> None:
    """After the drain, replies are written, webhooks and tasks get 2 s each, and uvicorn has 2 s for connections."""
    assert int(unit.one("TimeoutStopSec")) >= Config().server.drain_timeout_seconds + 10
    worker = Unit("img-serving-worker@.service")
    assert int(worker.one("TimeoutStopSec")) >= 15 + 10


def test_a_configuration_that_cannot_be_used_is_not_tried_again(unit: Unit) -> None:
    assert unit.one("Restart") == "on-failure"
    assert str(MISUSED) in unit.one("RestartPreventExitStatus").split()
    assert int(unit.one("StartLimitIntervalSec")) > int(unit.one("StartLimitBurst")) * int(unit.one("RestartSec"))


def test_the_unit_names_the_places_of_the_guide(unit: Unit) -> None:
    guide = GUIDE.read_text()
    assert unit.one("EnvironmentFile") == f"-{SETTINGS}/env"
    assert unit.one("WorkingDirectory") == STATE == f"/var/lib/{unit.one('StateDirectory')}"
    for place in ("/opt/img-serving", f"{SETTINGS}/config.toml", f"{SETTINGS}/env", f"{STATE}/data"):
        assert f"`{place}`" in guide


# what the unit starts, started


class Machine:
    """What systemd does for a service, in a directory: its places, its environment and no other, and a socket to be told at."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for place in (SETTINGS, STATE, "/var/cache/img-serving-worker"):
            self.at(place).mkdir(parents=True)
        self.told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.told.bind(str(directory / "notify"))
        self.told.settimeout(60)

    def at(self, place: str) -> Path:
        return self.directory / place.removeprefix("/")

    def started(self, unit: Unit, instance: str = "") -> subprocess.Popen[str]:
        def mapped(text: str) -> str:
            text = text.replace("%i", instance)
            return re.sub(r"(?<![\w./-])/(etc|var)/", lambda found: f"{self.directory}{found.group()}", text)

        environment = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")  # where the tests have the program from
        environment["NOTIFY_SOCKET"] = str(self.directory / "notify")
        for lines in unit.all("Environment"):
            environment |= dict(one.split("=", 1) for one in mapped(lines).split())
        for file in unit.all("EnvironmentFile"):
            path = Path(mapped(file.removeprefix("-")))
            environment |= dict(line.split("=", 1) for line in path.read_text().splitlines())
        program, *arguments = unit.one("ExecStart").split()
        assert program == PROGRAM
        words = [
            word
            for one in arguments
            for word in (shlex.split(environment[one[1:]]) if one[0] == "$" else [mapped(one)])
        ]
        umask = int(unit.one("UMask"), 8)
        with (self.directory / "journal").open("a") as journal:
            return subprocess.Popen(
                [sys.executable, "-m", "img_serving", *words],
                cwd=mapped(unit.one("WorkingDirectory")), env=environment, umask=umask,
                stdin=subprocess.DEVNULL, stdout=journal, stderr=journal, text=True,
            )  # fmt: skip

    @property
    def journal(self) -> str:
        return (self.directory / "journal").read_text()


@contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as directory:  # a short name: a Unix socket's address has 108 bytes at most
        made = Machine(Path(directory))
        yield made
        made.told.close()


def guides_settings() -> str:
    """The configuration that the guide has operators write."""
    (text,) = re.findall(r"config\.toml <<'TOML'\n(.*?)^TOML$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
    return str(text)


@pytest.mark.smoke
def test_the_gateway_of_the_unit_serves_with_the_guides_settings_and_ends_cleanly(machine: Machine, unit: Unit) -> None:
    port = free_port()
    settings = guides_settings()
    assert "port = 8080\n" in settings
    machine.at(f"{SETTINGS}/config.toml").write_text(settings.replace("port = 8080\n", f"port = {port}\n"))
    machine.at(f"{SETTINGS}/env").write_text(f"IMG_SERVING_API_KEY={KEY}\n")
    with ended(machine.started(unit)) as process:
        assert machine.told.recv(4096).startswith(b"READY=1"), machine.journal
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = json.dumps({"prompt": "a lake", "size": "64x64"})
        connection.request(
            "POST",
            "/v1/images/generations",
            body,
            {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
        )
        answered = connection.getresponse()
        assert answered.status == 200, answered.read()
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    kept = machine.at(STATE)
    assert sorted(path.name for path in kept.iterdir()) == ["data", "generated_images"]
    assert len(list((kept / "generated_images").glob("*.png"))) == 1
    assert all(path.stat().st_mode & 0o077 == 0 for path in kept.rglob("*")), "readable by its user alone"
    assert KEY not in machine.journal
    assert "shown once" not in machine.journal


@pytest.mark.smoke
def test_a_key_that_is_missing_ends_the_start_with_the_status_that_is_not_tried_again(
    machine: Machine, unit: Unit
) -> None:
    machine.at(f"{SETTINGS}/config.toml").write_text(guides_settings())
    machine.at(f"{SETTINGS}/env").write_text("")
    with ended(machine.started(unit)) as process:
        assert process.wait(60) == MISUSED
    assert "IMG_SERVING_API_KEY" in machine.journal


@pytest.mark.smoke
def test_the_worker_of_the_unit_serves_and_ends_cleanly(machine: Machine) -> None:
    (line,) = re.findall(r"echo '(WORKER_ARGS=.*)' >", GUIDE.read_text())
    assert "--port 50051" in line
    port = free_port()
    machine.at(f"{SETTINGS}/worker-first.env").write_text(line.replace("50051", str(port)) + "\n")
    with ended(machine.started(Unit("img-serving-worker@.service"), "first")) as process:
        until = time.monotonic() + 60
        while "ready after" not in machine.journal:
            assert time.monotonic() < until, machine.journal
            assert process.poll() is None, machine.journal
            time.sleep(0.05)
        socket.create_connection(("127.0.0.1", port), timeout=10).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(45) == 0
