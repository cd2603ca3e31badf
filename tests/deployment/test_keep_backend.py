"""A compose profile's backend is in the gateway's list while the profile runs: against real programs."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.programs import Program, free_port, serving
from tests.support.workers import working

KEEPER = Path(__file__).parents[2] / "deploy" / "compose" / "keep_backend.py"
SECONDS = 60.0


class Keeper:
    """A running `keep_backend.py`."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.kept = directory / "kept"
        self._log = directory / "keeper.txt"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


@contextmanager
def keeping(gateway_url: str, directory: Path, backend: dict[str, Any], **environment: str) -> Iterator[Keeper]:
    with (directory / "keeper.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(KEEPER), json.dumps(backend)],
            env={
                "PATH": "/usr/bin:/bin",
                "IMG_SERVING_URL": gateway_url,
                "IMG_SERVING_KEY_FILE": str(directory / "admin.env"),
                "KEPT_FILE": str(directory / "kept"),
                "LOOK_SECONDS": "0.2",
                **environment,
            },
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            yield Keeper(process, directory)
        finally:
            process.kill()
            process.wait(10)


@contextmanager
def gateway(directory: Path, config: str = "") -> Iterator[Program]:
    """As in the container: the key goes into a file."""
    key_file = directory / "admin.env"
    with serving(directory, config, environment={"IMG_SERVING_ENV_FILE": str(key_file)}) as program:
        if key_file.exists():
            program.key = key_file.read_text().strip().partition("=")[2]
        yield program


def eventually(what: Callable[[], Any], keeper: Keeper) -> Any:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (found := what()) is not None and found is not False:
            return found
        time.sleep(0.05)
    raise AssertionError(keeper.log)


def call(program: Program, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(  # noqa: S310 - our own
        program.url + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {program.key}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310 - our own
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def names(program: Program) -> list[str]:
    return [one["name"] for one in call(program, "GET", "/v1/backends")[1]["data"]]


def own(port: int, **more: Any) -> dict[str, Any]:
    return {"name": "worker", "protocol": "grpc", "endpoints": [f"grpc://127.0.0.1:{port}"], **more}


def removing(program: Program, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {"IMG_SERVING_URL": program.url, "IMG_SERVING_KEY_FILE": str(directory / "admin.env")}
    command = [sys.executable, str(KEEPER), "--remove", "worker"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.smoke
def test_a_worker_draws_until_it_is_removed_and_the_painter_again_afterwards(tmp_path: Path) -> None:
    with working("--model-name", "sdxl") as worker, gateway(tmp_path) as program:

        def drawn() -> Any:
            status, reply = call(program, "POST", "/v1/images/generations", {"prompt": "a", "size": "64x64"})
            return reply if status == 200 else None

        with keeping(program.url, tmp_path, own(worker.port)) as keeper:
            eventually(keeper.kept.exists, keeper)
            eventually(drawn, keeper)
            assert worker.metrics()['calls_total{outcome="ok"}'] >= 1
            assert keeper.stop() == 0
        assert names(program) == ["procedural", "worker"]
        done = removing(program, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert names(program) == ["procedural"]
        assert drawn() is not None
        again = removing(program, tmp_path)
        assert again.returncode == 1
        assert "404" in again.stderr


@pytest.mark.smoke
def test_jobs_that_wait_when_everything_is_stopped_are_drawn_by_the_same_engine_afterwards(tmp_path: Path) -> None:
    port = free_port()
    with (
        working("--model-name", "sdxl", "--slots", "1", port=port),
        gateway(tmp_path) as program,
        keeping(program.url, tmp_path, own(port, max_concurrency=1, max_batch_size=1)) as keeper,
    ):
        eventually(lambda: "sdxl" in str(call(program, "GET", "/v1/models")[1]), keeper)
        body = {"model": "sdxl", "prompt": "a", "size": "1024x1024", "num_inference_steps": 150}
        jobs = [call(program, "POST", "/v1/jobs", {"operation": "generation", "body": body})[1] for _ in range(4)]
        assert keeper.stop() == 0
    with (
        gateway(tmp_path) as again,
        working("--model-name", "sdxl", port=port),
        keeping(again.url, tmp_path, own(port)) as keeper,
    ):

        def over() -> list[Any] | None:
            records = [call(again, "GET", f"/v1/jobs/{job['id']}")[1] for job in jobs]
            return records if all(one["finished_at"] for one in records) else None

        records = eventually(over, keeper)
    assert [(one["status"], one["backend"]) for one in records] == [("succeeded", "worker")] * 4


@pytest.mark.smoke
def test_a_comfyui_draws_while_it_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeComfyUI() as comfyui:
            await asyncio.to_thread(draw, comfyui)

    def draw(comfyui: FakeComfyUI) -> None:
        backend = {"name": "comfyui", "protocol": "comfyui", "endpoints": [comfyui.url], "shared": True}
        with gateway(tmp_path) as program, keeping(program.url, tmp_path, backend) as keeper:
            asked = {"prompt": "a", "size": "64x64", "num_inference_steps": 1}

            def drawn() -> bool:  # until its models are known, the painter stands in
                return call(program, "POST", "/v1/images/generations", asked)[0] == 200 and bool(comfyui.drawn)

            eventually(drawn, keeper)

    asyncio.run(main())


@pytest.mark.smoke
def test_it_waits_for_the_gateway_and_for_its_key_and_puts_back_what_vanished(tmp_path: Path) -> None:
    first = tmp_path / "first"
    with gateway(first) as program:
        port = program.port
    with keeping(f"http://127.0.0.1:{port}", tmp_path, own(1)) as keeper:
        eventually(lambda: "no answer" in keeper.log, keeper)
        with serving(tmp_path, port=port, environment={"IMG_SERVING_ENV_FILE": str(tmp_path / "late.env")}) as program:
            eventually(lambda: "401" in keeper.log, keeper)
            assert "admin.env cannot be read: No such file" in keeper.log
            assert not keeper.kept.exists()
            (tmp_path / "late.env").rename(tmp_path / "admin.env")
            program.key = (tmp_path / "admin.env").read_text().strip().partition("=")[2]
            eventually(keeper.kept.exists, keeper)
            assert call(program, "DELETE", "/v1/backends/worker")[0] == 200
            eventually(lambda: "worker" in names(program), keeper)
        assert program.key not in keeper.log


@pytest.mark.smoke
def test_what_an_earlier_run_left_at_another_address_is_replaced(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        assert call(program, "POST", "/v1/backends", own(1))[0] == 201
        with keeping(program.url, tmp_path, own(2), BACKEND_API_KEY="s3cret") as keeper:
            eventually(keeper.kept.exists, keeper)
            (endpoint,) = call(program, "GET", "/v1/backends/worker")[1]["endpoints"]
            assert endpoint["url"].endswith(":2")
            assert "s3cret" not in keeper.log


@pytest.mark.smoke
def test_what_an_earlier_run_left_at_the_same_address_is_left_alone(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        assert call(program, "POST", "/v1/backends", own(1, weight=7))[0] == 201
        with keeping(program.url, tmp_path, own(1)) as keeper:
            eventually(keeper.kept.exists, keeper)
            assert call(program, "GET", "/v1/backends/worker")[1]["weight"] == 7


@pytest.mark.smoke
def test_a_backend_that_the_configuration_defines_is_left_alone(tmp_path: Path) -> None:
    config = '[[backends]]\nname = "worker"\nprotocol = "grpc"\nendpoints = ["grpc://127.0.0.1:3"]\n'
    with gateway(tmp_path, config) as program, keeping(program.url, tmp_path, own(2)) as keeper:
        eventually(keeper.kept.exists, keeper)
        assert keeper.stop() == 0
        assert "own configuration" in keeper.log
        (endpoint,) = call(program, "GET", "/v1/backends/worker")[1]["endpoints"]
        assert endpoint["url"].endswith(":3")


@pytest.mark.smoke
def test_a_key_of_the_operators_is_found_in_the_file_as_well(tmp_path: Path) -> None:
    """Where the configuration has keys, the gateway makes none, and writes the first admin key into its file."""
    with gateway(tmp_path, '[auth]\napi_keys = ["sk-of-the-operator"]\n') as program:
        assert program.key == "sk-of-the-operator"
        with keeping(program.url, tmp_path, own(1)) as keeper:
            eventually(keeper.kept.exists, keeper)


@pytest.mark.smoke
def test_what_the_gateway_does_not_take_is_said_with_its_reason(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        bad = own(1, time_out=3)
        with keeping(program.url, tmp_path, bad) as keeper:
            eventually(lambda: "time_out" in keeper.log, keeper)
            assert not keeper.kept.exists()
            assert keeper.process.poll() is None


@pytest.mark.parametrize("arguments", [[], ["worker"], ["[]"], ['{"protocol": "grpc"}'], ["{}", "{}"]])
def test_an_argument_that_is_no_backend_is_misuse(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(KEEPER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "one argument is needed" in done.stderr
