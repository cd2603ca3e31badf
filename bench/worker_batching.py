"""How much sooner 64 requests are done when a diffusers worker draws them in batches, and that no picture differs for it.

Gateway and worker are two programs; the model is a tiny Stable Diffusion with random weights, made here. The same requests go
to a worker with `--max-batch-size 1` and to one that draws eight at once, in turns; the ratio of the two times is what
counts. Then each picture is asked for alone, and compared byte by byte with what it was in company. Runs in the environment of
`make test-diffusers`. With `--check` the exit status is 1 when the target is missed or a picture differs.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

TARGET = 1.8
"""Times as fast with batches, at least."""
KEY = "batching-key"
READY_SECONDS = 120


@contextlib.contextmanager
def program(folder: Path, *arguments: str) -> Iterator[str]:
    """One of our programs, until the block ends; what it said until it listened, and a worker was ready."""
    ends = "ready" if arguments[0] == "worker" else " listens on "
    with (folder / f"{arguments[0]}.log").open("w") as log:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "src")}
        process = subprocess.Popen(
            [sys.executable, "-m", "img_serving", *arguments],
            stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment,
        )  # fmt: skip
        try:
            said = ""
            assert process.stdout is not None
            for line in process.stdout:
                said += line
                if ends in line:
                    break
            else:
                raise SystemExit(f"{arguments[0]} did not start: {said}{Path(log.name).read_text()}")
            yield said
        finally:
            process.terminate()
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()


@contextlib.contextmanager
def served(model: Path, folder: Path, most: int) -> Iterator[tuple[int, str]]:
    """A gateway in front of a worker that draws `most` at once: the gateway's port, and the worker's metrics page."""
    folder.mkdir()
    # one bucket, so that a picture's bytes do not depend on its company
    worker = ("worker", "--engine", "diffusers", "--model", str(model), "--port", "0", "--metrics-port", "0")
    with program(folder, *worker, "--offline", "--max-batch-size", str(most), "--buckets", str(most)) as said:
        port = re.search(r"listens on \S+:(\d+)", said)
        metrics = re.search(r"metrics: (\S+)", said)
        assert port is not None
        assert metrics is not None
        (folder / "config.toml").write_text(
            f'[auth]\napi_keys = ["{KEY}"]\n[rate_limit]\nenabled = false\n[server]\nhost = "127.0.0.1"\nport = 0\n'
            f'[[backends]]\nname = "sd"\nprotocol = "grpc"\nendpoints = ["http://127.0.0.1:{port[1]}"]\n'
        )
        with program(folder, "serve", "--config", "config.toml", "--port", "0") as listening:
            gateway = re.search(r"listens on http://\S+?:(\d+)", listening)
            assert gateway is not None
            until = time.monotonic() + READY_SECONDS
            while b'"data":[{' not in call(int(gateway[1]), "GET", "/v1/models"):
                assert time.monotonic() < until
                time.sleep(0.05)
            yield int(gateway[1]), metrics[1]


def call(port: int, method: str, path: str, body: object = None) -> bytes:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request(method, path, None if body is None else json.dumps(body), headers)
        reply = connection.getresponse()
        data = reply.read()
        if reply.status != 200:
            raise SystemExit(f"{path}: HTTP {reply.status}: {data[:300]!r}")
        return data
    finally:
        connection.close()


def drawn(port: int, seed: int, steps: int, size: int) -> bytes:
    body = {"prompt": f"a lighthouse, number {seed}", "seed": seed, "num_inference_steps": steps,
            "size": f"{size}x{size}", "response_format": "b64_json"}  # fmt: skip
    reply = json.loads(call(port, "POST", "/v1/images/generations", body))
    return base64.b64decode(reply["data"][0]["b64_json"])


def all_at_once(port: int, args: argparse.Namespace) -> tuple[float, list[bytes]]:
    """Seconds, and the pictures by seed."""
    with ThreadPoolExecutor(args.requests) as pool:
        began = time.perf_counter()
        pictures = list(pool.map(lambda seed: drawn(port, seed, args.steps, args.size), range(args.requests)))
        return time.perf_counter() - began, pictures


def batches(metrics_url: str) -> dict[str, int]:
    with urllib.request.urlopen(metrics_url, timeout=10) as reply:
        text = reply.read().decode()
    return {size: int(count) for size, count in re.findall(r'worker_pictures_total\{batch="(\d+)"\} (\d+)', text)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8, help="pictures that one worker draws at once (default 8)")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true", help="exit 1 when the target is missed or a picture differs")
    args = parser.parse_args()
    try:
        from tests.support import tiny_pipelines
    except ImportError as error:
        print(f"needs PyTorch and diffusers ({error.name} is missing): run it with .venv-diffusers/bin/python")
        return 2
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        model = tiny_pipelines.make("sd", folder / "tiny-sd")
        ratios = []
        with (
            served(model, folder / "single", 1) as (single, _),
            served(model, folder / "batched", args.batch) as (
                batched,
                metrics_url,
            ),
        ):
            for port in (single, batched):  # warms up: threads, connections, learned speeds
                all_at_once(port, argparse.Namespace(requests=args.batch, steps=args.steps, size=args.size))
            for round_ in range(1, args.rounds + 1):
                alone_seconds, _ = all_at_once(single, args)
                seconds, together = all_at_once(batched, args)
                ratios.append(alone_seconds / seconds)
                print(
                    f"round {round_}: {args.requests} requests one by one {alone_seconds:.2f} s, "
                    f"in batches {seconds:.2f} s: {ratios[-1]:.2f} times as fast",
                    flush=True,
                )
            print(f"pictures by the size of their batch: {batches(metrics_url)}")
            alone = [drawn(batched, seed, args.steps, args.size) for seed in range(args.requests)]
        same = sum(one == other for one, other in zip(alone, together, strict=True))
    ratio = statistics.median(ratios)
    print(f"{same} of {args.requests} pictures are the same bytes alone as in company")
    met = ratio >= TARGET and same == args.requests
    print(f"verdict: {ratio:.2f} times as fast with batches (at least {TARGET}): {'met' if met else 'MISSED'}")
    return 0 if met or not args.check else 1


if __name__ == "__main__":
    sys.exit(main())
