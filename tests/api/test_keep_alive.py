"""A plain request that takes long: its head goes out in time, blanks follow, and the JSON arrives; a failure cuts it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from tests.support.gateways import Harness, running, scripted
from tests.support.virtual_time import run_virtual

RETRY = {"x-stainless-retry-count": "1"}


def slow(seconds: float, **more: Any) -> str:
    return scripted("one", **{"latency_seconds": seconds, "backend__timeout_ms": 600_000, **more})


class Wire:
    """What went out on a connection, and when (seconds since the request)."""

    def __init__(self, gateway: Harness, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self.gateway = gateway
        self.body = body
        self.headers = headers or {}
        self.sent: list[tuple[float, dict[str, Any]]] = []
        self.done = asyncio.Event()
        self.gone = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        pieces = [json.dumps(self.body).encode()]

        async def receive() -> dict[str, Any]:
            if pieces:
                return {"type": "http.request", "body": pieces.pop(), "more_body": False}
            await self.gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append((round(loop.time() - began, 3), dict(message)))

        headers = {
            "authorization": f"Bearer {self.gateway.client.key}",
            "content-type": "application/json",
            **self.headers,
        }
        scope = {
            "type": "http", "method": "POST", "path": "/v1/images/generations",
            "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        await self.gateway.gateway.app(scope, receive, send)

    @property
    def status(self) -> int:
        return int(self.sent[0][1]["status"])

    @property
    def head(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0][1]["headers"]}

    @property
    def text(self) -> bytes:
        return b"".join(message.get("body", b"") for _, message in self.sent[1:])

    @property
    def is_complete(self) -> bool:
        return bool(self.sent) and len(self.sent) > 1 and not self.sent[-1][1].get("more_body")


def on_the_wire(toml: str, check: Callable[[Harness], Awaitable[None]]) -> None:
    async def main() -> None:
        async with running(toml) as gateway:
            await check(gateway)

    run_virtual(main())


def test_an_answer_after_310_s_has_its_head_after_50_and_a_blank_every_15() -> None:
    async def check(gateway: Harness) -> None:
        wire = Wire(gateway, {"prompt": "x", "size": "64x64"})
        await wire.run()
        times = [at for at, message in wire.sent if message["type"] == "http.response.body" and message["body"] == b" "]
        assert wire.sent[0][0] == 50
        assert times == [50 + 15 * number for number in range(18)]
        assert wire.status == 200
        assert wire.head["content-type"] == "application/json"
        assert "content-length" not in wire.head
        assert wire.head["x-job-id"].startswith("job_")
        assert wire.is_complete
        assert json.loads(wire.text)["data"][0]["url"]
        assert "img_serving_kept_open_total 1" in (await gateway.client.get("/metrics")).body.decode()

    on_the_wire(slow(310), check)


def test_a_quick_answer_has_no_blanks_and_nothing_is_left() -> None:
    async def check(gateway: Harness) -> None:
        for _ in range(20):
            assert (await gateway.client.draw(size="64x64")).body[:1] == b"{"
        assert len(gateway.gateway.app._keep_alive) == 0

    on_the_wire(slow(49), check)


@pytest.mark.parametrize(("after", "expected", "pause"), [(10, 10.0, 10), (100, 100.0, 15), (0, 310.0, 0)])
def test_keepalive_after_seconds(after: float, expected: float, pause: float) -> None:
    async def check(gateway: Harness) -> None:
        wire = Wire(gateway, {"prompt": "x", "size": "64x64"})
        await wire.run()
        assert wire.sent[0][0] == expected
        if pause:
            assert wire.sent[2][0] - wire.sent[1][0] == pause

    on_the_wire(slow(310) + f"[server]\nkeepalive_after_seconds = {after}\n", check)


@pytest.mark.parametrize("seconds", [50, 65, 80])
def test_an_answer_that_comes_together_with_the_head_or_a_blank_is_whole(seconds: float) -> None:
    async def check(gateway: Harness) -> None:
        wire = Wire(gateway, {"prompt": "x", "size": "64x64"})
        await wire.run()
        assert wire.status == 200
        assert wire.is_complete
        assert json.loads(wire.text)["data"]

    on_the_wire(slow(seconds), check)


def test_many_waiting_replies_each_have_their_own_time() -> None:
    async def check(gateway: Harness) -> None:
        wires = [Wire(gateway, {"prompt": str(number), "size": "64x64"}) for number in range(5)]

        async def later(number: int, wire: Wire) -> None:
            await asyncio.sleep(number * 7)
            await wire.run()

        await asyncio.gather(*[later(number, wire) for number, wire in enumerate(wires)])
        assert [wire.sent[0][0] for wire in wires] == [50] * 5
        assert all(json.loads(wire.text) for wire in wires)

    on_the_wire(slow(80), check)


def test_a_failure_after_the_head_cuts_the_connection() -> None:
    async def check(gateway: Harness) -> None:
        wire = Wire(gateway, {"prompt": "x", "size": "64x64"})
        await wire.run()
        assert wire.status == 200
        assert not wire.is_complete
        assert wire.text.strip() == b""
        line = gateway.log_lines()[-1]
        assert line["status"] == 502
        assert line["outcome"] == "failed"

    on_the_wire(slow(100, sequence=["fail"]), check)


def test_its_retry_is_told_the_failure_once_and_then_tries_again() -> None:
    async def check(gateway: Harness) -> None:
        body = {"prompt": "x", "size": "64x64"}
        await Wire(gateway, body, {"x-stainless-retry-count": "0"}).run()
        await asyncio.sleep(30)
        told = await gateway.client.post("/v1/images/generations", body, headers=RETRY)
        assert told.status == 502
        assert told.error["code"] == "backend_failed"
        assert told.headers["x-should-retry"] == "false"
        assert gateway.adapter("one").count == 1
        again = await gateway.client.post("/v1/images/generations", body, headers=RETRY)
        assert again.status == 200
        assert gateway.adapter("one").count == 2

    on_the_wire(slow(100, sequence=["fail", "ok"], repeat="last"), check)


@pytest.mark.parametrize(
    ("wait", "headers", "body"),
    [(61, RETRY, {}), (1, {}, {}), (1, {"x-stainless-retry-count": "0"}, {}), (1, RETRY, {"seed": 1})],
)
def test_nobody_else_is_told_it(wait: float, headers: dict[str, str], body: dict[str, Any]) -> None:
    async def check(gateway: Harness) -> None:
        asked = {"prompt": "x", "size": "64x64"}
        await Wire(gateway, asked).run()
        await asyncio.sleep(wait)
        reply = await gateway.client.post("/v1/images/generations", {**asked, **body}, headers=headers)
        assert reply.status == 200

    on_the_wire(slow(60, sequence=["fail", "ok"], repeat="last"), check)


def test_a_failure_in_time_has_its_own_status_and_is_not_remembered() -> None:
    async def check(gateway: Harness) -> None:
        body = {"prompt": "x", "size": "64x64"}
        assert (await gateway.client.post("/v1/images/generations", body)).status == 502
        assert (await gateway.client.post("/v1/images/generations", body, headers=RETRY)).status == 200

    on_the_wire(slow(40, sequence=["fail", "ok"], repeat="last"), check)


def test_a_request_with_a_key_trickles_too_and_its_retry_is_told_its_failure() -> None:
    async def check(gateway: Harness) -> None:
        body = {"prompt": "x", "size": "64x64"}
        key = {"idempotency-key": "k"}
        wire = Wire(gateway, body, key)
        await wire.run()
        assert wire.sent[0][0] == 50
        assert not wire.is_complete
        told = await gateway.client.post("/v1/images/generations", body, headers=key)
        assert (told.status, told.error["code"]) == (502, "backend_failed")
        assert gateway.adapter("one").count == 1

    on_the_wire(slow(100, sequence=["fail"]), check)


def test_a_client_that_leaves_while_it_trickles_is_noticed() -> None:
    async def check(gateway: Harness) -> None:
        wire = Wire(gateway, {"prompt": "x", "size": "64x64"})
        asking = asyncio.ensure_future(wire.run())
        await asyncio.sleep(70)
        wire.gone.set()
        await asking
        assert gateway.adapter("one").cancelled == 1
        sent = len(wire.sent)
        await asyncio.sleep(100)
        assert len(wire.sent) == sent

    on_the_wire(slow(310), check)
