"""The receiver that the documentation shows takes what the gateway sends, once, and nothing else."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from img_serving.gateway.webhooks import WebhookDeliverer, event_for
from img_serving.policy.webhooks import signed_headers, written_secret
from img_serving.ports import StoredWebhook
from img_serving.state.memory import MemoryState
from img_serving.telemetry.metrics import Metrics
from img_serving.transport.webhook_post import SafePoster

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "webhook_receiver.py"
PAGE = EXAMPLE.parent.parent / "docs" / "webhooks.md"
KEY = b"k" * 32
BODY = b'{"type":"job.succeeded"}'


@pytest.fixture
def receiver() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Its URL and its process."""
    environment = {**os.environ, "WEBHOOK_SECRET": written_secret(KEY)}
    process = subprocess.Popen(
        [sys.executable, str(EXAMPLE), "0"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().split()[-1] + "/hook", process
    finally:
        process.kill()
        process.wait(10)
        process.stdout.close()


async def tried(state: MemoryState) -> None:
    """Wait until every event was tried."""
    async with asyncio.timeout(10):
        while True:
            if all(one.attempts for one in await state.find_webhooks(limit=100)):
                return
            await asyncio.sleep(0.01)


async def send(url: str, key: bytes, numbers: list[int]) -> list[StoredWebhook]:
    """Send an event a number, and once more whatever became of it; returns them as they are then."""
    state = MemoryState()
    deliverer = WebhookDeliverer(
        state,
        SafePoster(allow_private_addresses=True),
        (key,),
        clock_unix=time.time,
        rng=Random(7),
        metrics=Metrics(),
    )
    for number in numbers:
        await state.add_webhook(
            event_for(
                b'{"id":"job_%d"}' % number,
                job_id=f"job_{number}",
                tenant="team",
                status="succeeded",
                url=url,
                ended_at=time.time(),
            )
        )
    running = asyncio.create_task(deliverer.run())
    ids = [one.event_id for one in await state.find_webhooks(limit=100)]
    for is_again in (False, True):
        if is_again:
            for event_id in ids:
                await deliverer.redeliver(event_id)
        await tried(state)
    await deliverer.close()
    await running
    return await state.find_webhooks(limit=100)


def test_it_takes_every_event_once_however_often_it_comes(receiver):
    url, process = receiver
    events = asyncio.run(send(url, KEY, [1, 2, 3]))
    assert {one.state for one in events} == {"delivered"}
    process.kill()
    assert sorted(process.stdout.read().splitlines()) == [f"job.succeeded job_{number}" for number in (1, 2, 3)]


def test_it_takes_nothing_that_is_signed_with_another_secret(receiver):
    url, process = receiver
    (event,) = asyncio.run(send(url, b"x" * 32, [1]))
    assert (event.state, event.last_error) == ("pending", "the receiver answered HTTP 401")
    process.kill()
    assert process.stdout.read() == ""


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("webhook_receiver", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headers(timestamp: int = 1000, *, keys: tuple[bytes, ...] = (KEY,)) -> dict[str, str]:
    return dict(signed_headers(keys, "evt_1", timestamp, BODY))


def test_any_of_several_signatures_will_do(example):
    assert example.verify(KEY, headers(keys=(b"x" * 32, KEY)), BODY, 1000.0) == "evt_1"
    assert example.key_of(written_secret(KEY)) == KEY
    assert example.key_of(f"{written_secret(KEY)}\n{written_secret(b'x' * 32)}") == KEY


UNUSABLE = ["", " ", "whsec_", written_secret(b"k" * 23), "k" * 31, "whsec_%%%", "bash: img-serving: command not found"]


@pytest.mark.parametrize("secret", UNUSABLE)
def test_a_secret_that_anybody_could_sign_with_is_none(example, secret):
    with pytest.raises(ValueError, match=r"it (has|is not)"):
        example.key_of(secret)


@pytest.mark.parametrize("given", [{}, {"WEBHOOK_SECRET": ""}, {"WEBHOOK_SECRET": "whsec_"}])
def test_it_does_not_start_without_a_secret_and_says_what_to_run(given):
    environment = {name: value for name, value in os.environ.items() if name != "WEBHOOK_SECRET"}
    ended = subprocess.run(
        [sys.executable, str(EXAMPLE), "0"],
        env={**environment, **given},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ".venv/bin/img-serving webhooks secret" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("now", [1301.0, 699.0])
def test_a_call_from_another_time_is_refused(example, now):
    with pytest.raises(example.NotGenuine, match="old"):
        example.verify(KEY, headers(), BODY, now)


@pytest.mark.parametrize(
    "changed",
    [
        {"webhook-id": "evt_2"},
        {"webhook-timestamp": "1001"},
        {"webhook-timestamp": ""},
        {"webhook-timestamp": "1e3"},
        {"webhook-signature": ""},
        {"webhook-signature": "v1,"},
        {"webhook-signature": "v1,%%%"},
        {"webhook-signature": "v1," + base64.b64encode(b"x" * 32).decode()},
    ],
)
def test_what_was_changed_on_the_way_is_refused(example, changed):
    with pytest.raises(example.NotGenuine):
        example.verify(KEY, {**headers(), **changed}, BODY, 1000.0)


@pytest.fixture(scope="module")
def verify() -> Any:
    """The function of the page."""
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    pasted: dict[str, Any] = {}
    exec(snippet, pasted)  # noqa: S102 - the page's own code
    return pasted["verify"]


@pytest.mark.parametrize("secret", UNUSABLE)
def test_the_snippet_of_the_page_takes_no_call_with_a_secret_that_anybody_could_sign_with(verify, secret):
    now = int(time.time())
    for key in (b"", b"k" * 23, b"k" * 31):
        with pytest.raises(ValueError, match=r"secret|base64|padding"):
            verify(secret, headers(now, keys=(key,)), BODY)


def test_the_snippet_of_the_page_works_as_it_is_pasted(verify):
    now = int(time.time())
    assert verify(written_secret(KEY), headers(now, keys=(b"x" * 32, KEY)), BODY) == "evt_1"
    for key, stamp, body in ((b"y" * 32, now, BODY), (KEY, now - 400, BODY), (KEY, now, BODY + b" ")):
        with pytest.raises(ValueError, match=r"fits|old"):
            verify(written_secret(key), headers(stamp), body)


def test_what_it_remembers_is_bounded(example, monkeypatch):
    monkeypatch.setattr(example, "MAX_REMEMBERED", 2)
    seen = example.Seen()
    assert [seen.add(event_id) for event_id in ("a", "b", "a", "c", "a")] == [True, True, False, True, True]
