"""The real gateway and the real worker, two programs over real sockets."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.support.programs import Program, free_port, serving
from tests.support.workers import WorkerProgram, working

pytestmark = pytest.mark.smoke

FOX = {"prompt": "눈 속의 여우", "size": "96x64", "steps": 4, "seed": 5, "response_format": "b64_json"}


def config_for(port: int, more: str = "") -> str:
    return f"""
[auth]
enabled = false
[[backends]]
name = "own"
protocol = "grpc"
endpoints = ["http://127.0.0.1:{port}"]
health_check_interval_secs = 0.2
health_check_fall = 1
{more}
"""


def draw(program: Program, **more: Any) -> tuple[int, Any, dict[str, str]]:
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=60)
    try:
        body = json.dumps(FOX | more)
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        reply = connection.getresponse()
        return reply.status, json.loads(reply.read()), {name.lower(): value for name, value in reply.getheaders()}
    finally:
        connection.close()


def pictures(body: Any) -> list[bytes]:
    return [base64.b64decode(one["b64_json"]) for one in body["data"]]


def until_up(program: Program) -> None:
    give_up = time.monotonic() + 20
    while time.monotonic() < give_up:
        if draw(program)[0] == 200:
            return
    raise AssertionError(program.log)


def test_a_seed_gives_the_same_bytes_from_the_built_in_backend_and_from_a_worker(tmp_path: Path) -> None:
    with serving(tmp_path / "alone", "[auth]\nenabled = false\n") as alone:
        status, body, _ = draw(alone, n=3)
        assert status == 200
        built_in = pictures(body)
    with working() as worker, serving(tmp_path / "both", config_for(worker.port)) as gateway:
        assert worker.said.count("\n") == 3
        until_up(gateway)
        status, body, headers = draw(gateway, n=3, model="whatever")
        assert (status, headers["x-backend"], headers["x-img-serving-ignored"]) == (200, "own", "model")
        assert pictures(body) == built_in
        assert pictures(draw(gateway, seed=7)[1]) == built_in[2:], "picture 2 of seed 5 is picture 0 of seed 7"


def test_requests_that_come_together_travel_together(tmp_path: Path) -> None:
    with working("--slots", "1") as worker, serving(tmp_path, config_for(worker.port)) as gateway:
        until_up(gateway)
        with ThreadPoolExecutor(24) as pool:
            drawn = list(pool.map(lambda seed: draw(gateway, seed=seed, steps=20), range(24)))
        assert {status for status, _, _ in drawn} == {200}
        assert len({pictures(body)[0] for _, body, _ in drawn}) == 24
        batches = {name: count for name, count in worker.metrics().items() if name.startswith("pictures_total")}
        assert batches.get('pictures_total{batch="8"}', 0) >= 8, batches


def test_a_worker_that_dies_and_comes_back_is_used_again(tmp_path: Path) -> None:
    port = free_port()
    with serving(tmp_path, config_for(port)) as gateway:
        for _ in range(2):
            with working(port=port) as worker:
                until_up(gateway)
                assert worker.stop(signal.SIGKILL) != 0
            status, body, _ = draw(gateway)
            assert status in {502, 503}
            assert "own" in body["error"]["message"] or "no backend" in body["error"]["message"].lower()


def test_a_client_that_leaves_stops_the_worker(tmp_path: Path) -> None:
    with working() as worker, serving(tmp_path, config_for(worker.port)) as gateway:
        until_up(gateway)
        connection = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=10)
        body = json.dumps(FOX | {"steps": 200, "size": "1024x1024"})
        connection.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        await_metric(worker, "drawing", 1)
        connection.close()
        await_metric(worker, 'calls_total{outcome="cancelled"}', 1)
        assert worker.metrics()["drawing"] == 0


def test_sigterm_lets_a_running_picture_finish(tmp_path: Path) -> None:
    with working() as worker, serving(tmp_path, config_for(worker.port)) as gateway:
        until_up(gateway)
        with ThreadPoolExecutor(1) as pool:
            drawing = pool.submit(draw, gateway, steps=150, size="512x512")
            await_metric(worker, "drawing", 1)
            assert worker.stop() == 0
            assert drawing.result()[0] == 200


STUBBORN = """
import sys, time
from img_serving.domain.capabilities import Capabilities

class Stubborn:
    def load(self):
        if "--model" in sys.argv:
            yield 0.1, "something endless"
            time.sleep(600)
    def __init__(self, model=None):
        pass
    def capabilities(self):
        return Capabilities()
    def generate(self, batch, on_step):
        time.sleep(600)
"""


@pytest.mark.parametrize("when", ["loading", "drawing"])
def test_sigterm_ends_a_worker_whose_engine_hears_nothing(tmp_path: Path, when: str) -> None:
    (tmp_path / "stubborn.py").write_text(STUBBORN)
    arguments = ["--engine", "stubborn.py:Stubborn", "--drain-seconds", "0.2", "--no-warm-up"]
    if when == "loading":
        with working(*arguments, "--model", "x", until=" listens on ", cwd=tmp_path) as worker:
            assert worker.stop() == 0
        return
    with (
        working(*arguments, cwd=tmp_path) as worker,
        serving(tmp_path / "g", config_for(worker.port)) as gateway,
        ThreadPoolExecutor(1) as pool,
    ):
        drawing = pool.submit(draw, gateway, size="64x64")
        await_metric(worker, "drawing", 1)
        assert worker.stop() == 0
        assert drawing.result()[0] == 502


def test_a_token_and_the_wrong_one(tmp_path: Path) -> None:
    with working(IMG_SERVING_WORKER_TOKEN="right-token") as worker:
        with serving(tmp_path / "right", config_for(worker.port, 'api_key = "right-token"')) as gateway:
            until_up(gateway)
        with serving(tmp_path / "wrong", config_for(worker.port, 'api_key = "wrong-token"')) as gateway:
            status, body, _ = draw(gateway)
            assert status in {502, 503}
            assert "wrong-token" not in json.dumps(body) + gateway.log


def await_metric(worker: WorkerProgram, name: str, value: float) -> None:
    give_up = time.monotonic() + 10
    while worker.metrics().get(name) != value:
        assert time.monotonic() < give_up, worker.metrics()
