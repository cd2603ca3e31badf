"""A gateway and a worker under traffic of every kind, so that their metrics show whatever they can show."""

from __future__ import annotations

import json
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

from tests.support.programs import Program, serving
from tests.support.workers import WorkerProgram, working

SECONDS = 120.0
"""For something to happen, on a machine that does much else."""

CONFIG = """\
[auth]
api_keys = ["sk-admin", {{ name = "kim", key = "sk-kim", rate_limit = {{ requests_per_second = 0.01, burst_size = 1 }} }}]
[queue]
max_tasks = 8
[webhooks]
allow_private_addresses = true
{backends}
[[backends]]
name = "worker"
protocol = "grpc"
endpoints = ["grpc://127.0.0.1:{worker}"]
health_check_interval_secs = 1
"""

SCRIPTS = {
    "steady": 'sequence = ["ok"]\nlatency_seconds = 0.01\nsteps = 4',
    "slow": 'sequence = ["ok"]\nlatency_seconds = 1\nmax_concurrency = 1\nmax_batch_size = 1',
    "broken": 'sequence = ["fail"]',
    "picky": 'sequence = ["refuse"]',
    "odd": 'sequence = ["bad_size"]',
}

Sample = tuple[str, dict[str, str]]
_LINE = re.compile(r"([a-zA-Z_:][\w:]*)(?:\{(.*)\})? \S+")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def samples_of(text: str) -> list[Sample]:
    """The names and labels on a page of metrics."""
    lines = (_LINE.fullmatch(line) for line in text.splitlines() if line and not line.startswith("#"))
    return [(line[1], dict(_LABEL.findall(line[2] or ""))) for line in lines if line is not None]


@dataclass
class Driven:
    """Running programs with traffic between them."""

    program: Program
    worker: WorkerProgram

    @property
    def metrics_url(self) -> str:
        return f"{self.program.url}/metrics"

    def page(self) -> str:
        """What a scrape of both would find."""
        pages = []
        for url in (self.metrics_url, self.worker.metrics_url):
            with urllib.request.urlopen(url, timeout=SECONDS) as reply:  # noqa: S310 - our own
                pages.append(reply.read().decode())
        return "".join(pages)


@contextmanager
def driven(directory: Path) -> Iterator[Driven]:
    """A gateway and a worker, driven until the block ends."""
    backends = "".join(
        f'[[backends]]\nname = "{name}"\nprotocol = "scripted"\n[backends.scripted]\nmodels = ["{name}"]\n{script}\n'
        for name, script in SCRIPTS.items()
    )
    with working("--model-name", "painted") as worker:
        config = CONFIG.format(backends=backends, worker=worker.port)
        with serving(directory, config) as program, _receiving() as hook:
            stop = Event()
            rounds = [lambda: _round(program, hook), *(lambda: _call(program, "slow") for _ in range(3))]
            threads = [Thread(target=_repeat, args=(one, stop)) for one in rounds]
            for thread in threads:
                thread.start()
            try:
                yield Driven(program, worker)
            finally:
                stop.set()
                for thread in threads:
                    thread.join(SECONDS)


def _repeat(once: Any, stop: Event) -> None:
    while not stop.wait(0.05):
        with suppress(OSError):
            once()


def _round(program: Program, hook: str) -> None:
    reply = _call(program, "steady")
    if "data" not in reply:
        raise AssertionError(reply)
    with urllib.request.urlopen(reply["data"][0]["url"], timeout=SECONDS) as picture:  # noqa: S310 - our own
        picture.read()
    _call(program, "painted", num_inference_steps=4)
    _call(program, "steady", output_format="jpeg", n=2)
    for model in ("broken", "picky", "odd"):
        _call(program, model)
    _call(program, "slow", n=10)  # more than may wait
    for _ in range(2):
        _call(program, "steady", key="sk-kim")
    _call(program, "steady", key="sk-nobody")
    job = {"operation": "generation", "body": {"model": "steady", "prompt": "a", "size": "64x64"}, "webhook_url": hook}
    _post(program, "/v1/jobs", job, "sk-admin")


def _call(program: Program, model: str, *, key: str = "sk-admin", **more: Any) -> Any:
    asked = {"model": model, "prompt": "a", "size": "64x64", "seed": time.monotonic_ns() % 2**31, **more}
    return _post(program, "/v1/images/generations", asked, key)


def _post(program: Program, path: str, body: dict[str, Any], key: str) -> Any:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    request = urllib.request.Request(program.url + path, json.dumps(body).encode(), headers)  # noqa: S310 - our own
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310 - our own
            return json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return json.load(error)


@contextmanager
def _receiving() -> Iterator[str]:
    """The URL of a webhook that takes every second call."""

    class Hook(BaseHTTPRequestHandler):
        calls = 0

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            Hook.calls += 1
            self.send_response(204 if Hook.calls % 2 else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name for it
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
