"""What /metrics says of the process is what the system says of it."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from contextlib import suppress
from pathlib import Path

import pytest
from tests.support.gateways import running

from img_serving.telemetry.process import render_process

LINUX = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="NO /proc")


def measured(text: bytes) -> dict[str, float]:
    pairs = (line.rpartition(" ") for line in text.decode().splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in pairs}


@LINUX
def test_the_numbers_are_those_of_this_process() -> None:
    before = time.process_time()
    said = measured(render_process())
    assert before <= said["process_cpu_seconds_total"] <= time.process_time()
    assert 2**20 < said["process_resident_memory_bytes"] < said["process_virtual_memory_bytes"]
    assert 0 < said["process_open_fds"] < said["process_max_fds"]
    age = time.time() - said["process_start_time_seconds"]
    assert age == pytest.approx(float(Path("/proc/uptime").read_text().split()[0]) - started_ticks(), abs=5)


def started_ticks() -> float:
    """When this process started, in seconds since boot."""
    stat = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return int(stat[19]) / os.sysconf("SC_CLK_TCK")


@LINUX
def test_an_open_file_is_counted() -> None:
    before = measured(render_process())["process_open_fds"]
    with Path(os.devnull).open():
        assert measured(render_process())["process_open_fds"] == before + 1


def test_where_there_is_no_proc_the_processor_time_is_still_told(tmp_path: Path) -> None:
    assert list(measured(render_process(tmp_path))) == ["process_cpu_seconds_total", "process_max_fds"]


@LINUX
def test_a_process_without_a_free_descriptor_says_so() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[int] = []
    try:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 8, limits[1])
        )
        with suppress(OSError):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        said = measured(render_process())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for one in held:
            os.close(one)
    assert said["process_open_fds"] == said["process_max_fds"]


def test_every_number_has_its_help_and_its_type() -> None:
    lines = render_process().decode().splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("#"):
            name = line.split()[0]
            assert lines[number - 2].startswith(f"# HELP {name} ")
            assert lines[number - 1].startswith(f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}")
    assert render_process().endswith(b"\n")


def test_the_gateways_page_has_them_behind_its_own() -> None:
    async def main() -> None:
        async with running() as gateway:
            text = (await gateway.nobody.get("/metrics")).body.decode()
            assert "\nprocess_cpu_seconds_total " in text
            assert text.index("img_serving_info") < text.index("process_cpu_seconds_total")

    asyncio.run(main())
