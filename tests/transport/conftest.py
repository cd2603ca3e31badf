"""Loops, and a certificate, for tests over sockets."""

from __future__ import annotations

import asyncio
import gc
import shutil
import subprocess
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine on the loop named by the test's parameter; what reaches the loop's error handler fails the test."""

    def runner(coroutine: Coroutine[Any, Any, None]) -> None:
        noise: list[dict[str, Any]] = []
        factory = uvloop.new_event_loop if request.param == "uvloop" else asyncio.new_event_loop
        with asyncio.Runner(loop_factory=factory) as loop_runner:
            loop_runner.get_loop().set_exception_handler(lambda _, context: noise.append(context))
            loop_runner.run(coroutine)
            gc.collect()
        assert not noise

    return runner


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate with its key in one file, made anew for each run."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("the openssl program is not here to make a certificate")
    folder = tmp_path_factory.mktemp("tls")
    made = folder / "both.pem"
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    subprocess.run(
        [
            *(openssl, *arguments.split()),
            *("-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"),
            *("-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")),
        ],
        check=True,
        capture_output=True,
    )
    made.write_bytes((folder / "key.pem").read_bytes() + (folder / "cert.pem").read_bytes())
    return made
