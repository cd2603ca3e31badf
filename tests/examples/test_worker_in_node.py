"""The page says that a worker can be written in any language: here one in JavaScript is drawn with."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from img_serving.backends.grpc import GrpcBackend
from img_serving.domain.errors import BackendRefusal
from img_serving.domain.images import Artifact, Progress
from img_serving.engines.engine import call_of

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("node and npm are not here: the worker in JavaScript is not tried")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if tuple(int(part) for part in version.lstrip("v").split(".")[:2]) < (20, 15):
        pytest.skip(f"node {version} is too old for the worker in JavaScript, which needs 20.15")
    home = tmp_path_factory.mktemp("node")
    shutil.copytree(ROOT / "proto", home / "proto")
    there = home / "examples" / "worker_in_node"
    shutil.copytree(ROOT / "examples" / "worker_in_node", there, ignore=shutil.ignore_patterns("node_modules"))
    installed = subprocess.run(
        [npm, "ci", "--no-audit", "--no-fund", "--ignore-scripts"],
        cwd=there,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    if installed.returncode != 0:
        pytest.skip("npm ci did not work here, so the worker in JavaScript is not tried")
    worker = subprocess.Popen([node, "worker.mjs", "0"], cwd=there, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        yield f"http://127.0.0.1:{int(worker.stdout.readline().split()[-1])}"
    finally:
        worker.terminate()
        worker.wait(10)
        assert worker.stdout is not None
        worker.stdout.close()


def test_it_draws_batches_tells_progress_refuses_and_can_be_cancelled(url: str) -> None:
    async def main() -> None:
        backend = GrpcBackend(url)
        try:
            report = await backend.check(5.0)
            assert (report.healthy, report.models, report.found) == (True, ("flat",), "a worker in node 1")
            told: list[Progress] = []
            drawn = await backend.generate(call_of("a fox", "a fox", seed=5, width=64, height=32), told.append)
            assert [(one.width, one.height, one.seed) for one in drawn if isinstance(one, Artifact)] == [
                (64, 32, 5),
                (64, 32, 6),
            ]
            assert [one.done for one in told] == list(range(1, 11))
            (again,) = await backend.generate(call_of("a fox", seed=6, width=64, height=32), told.append)
            assert again == drawn[1], "equal seeds give equal pictures, alone and in a batch"
            with pytest.raises(BackendRefusal) as caught:
                await backend.generate(call_of(*"abcde"), told.append)
            assert caught.value.error.param == "items"
            endless = asyncio.create_task(backend.generate(call_of("x", steps=100_000), told.append))
            async with asyncio.timeout(10):
                while told[-1].total != 100_000:  # noqa: ASYNC110 - the worker's doing
                    await asyncio.sleep(0.005)
            endless.cancel()
            with pytest.raises(asyncio.CancelledError):
                await endless
        finally:
            await backend.close()

    asyncio.run(main())
