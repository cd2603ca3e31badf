"""A gateway inside this process, for one request: nothing listens, and nothing is kept on disk."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec

from img_serving.api.generation import Bounds, GenerationBody, to_request
from img_serving.cli.client import Answer
from img_serving.cli.endings import CommandFailed
from img_serving.cli.progress import Watch
from img_serving.config import Config
from img_serving.domain.errors import GatewayError
from img_serving.domain.jobs import Job
from img_serving.domain.tenants import ANONYMOUS
from img_serving.main import build
from img_serving.state.memory import MemoryState
from img_serving.storage.memory import MemoryStore
from img_serving.telemetry.logs import RequestLog

POLL_SECONDS = 0.1


def draw(config: Config, body: Mapping[str, Any], watch: Watch) -> Answer:
    """What a gateway with that configuration answers to `body`.

    Raises:
        CommandFailed: it refuses or fails.
    """
    with _quiet_logs():
        try:
            return asyncio.run(_draw(config, body, watch))
        except GatewayError as error:
            raise CommandFailed(error.message) from error


async def _draw(config: Config, body: Mapping[str, Any], watch: Watch) -> Answer:
    request = to_request(msgspec.convert(body, GenerationBody), _bounds(config))
    gateway = await build(
        config,
        state=MemoryState(),
        store=MemoryStore(),
        key_hashes=[],
        request_log=RequestLog(2, "console", enabled=False),
    )
    try:
        await gateway.start()
        started = time.monotonic()
        pipeline = gateway.services.pipeline
        job = pipeline.admit(ANONYMOUS, request, "req_local")
        drawing = asyncio.ensure_future(pipeline.run(job, "b64_json", lambda: ""))
        try:
            while not drawing.done():
                await asyncio.wait({drawing}, timeout=POLL_SECONDS)
                watch(_share(job))
        finally:
            drawing.cancel()  # after Ctrl-C; one that is done does not mind
        answer = await drawing
        headers = {"x-backend": job.backend or "", "x-job-id": job.id}
        if answer.ignored:
            headers["x-img-serving-ignored"] = ", ".join(answer.ignored)
        return Answer(headers, b"".join(answer.parts), time.monotonic() - started)
    finally:
        await gateway.stop()


def _share(job: Job) -> float:
    """How far it is: pictures that are there count whole, those that are being drawn by the engine's steps."""
    if job.is_over:
        return 1.0
    finished = sum(task.artifact is not None for task in job.tasks)
    running = sum(task.started and task.artifact is None for task in job.tasks)
    steps = job.steps_done / job.steps_total if job.steps_total else 0.0
    return (finished + running * min(steps, 1.0)) / len(job.tasks)


def _bounds(config: Config) -> Bounds:
    limits = config.limits
    return Bounds(
        max_n=limits.max_n,
        max_pixels=limits.max_pixels,
        max_steps=limits.max_steps,
        max_prompt_chars=limits.max_prompt_chars,
        default_format="b64_json",
        allow_file=False,
    )


@contextmanager
def _quiet_logs() -> Iterator[None]:
    """Only what is broken is worth a line between the pictures of somebody who did not start a server."""
    log = logging.getLogger("img_serving")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)
