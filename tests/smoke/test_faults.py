"""The real program in front of servers that fail in the ways that real ones do: its clients are not to notice."""

from __future__ import annotations

import asyncio
import base64
import json
import signal
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.support.programs import Program, serving

from img_serving.backends.scripted import picture
from img_serving.backends.scripted_server import ScriptedServer
from img_serving.backends.stub_server import Exchange

pytestmark = pytest.mark.smoke

KEY = "sk-test"
SERVERS = 5


def configuration(servers: Sequence[ScriptedServer], *, drain_seconds: int = 15, **more: object) -> str:
    lines = {"endpoints": [server.url for server in servers], "models": ["m"], **more}
    return "\n".join(
        [
            "[server]", f"drain_timeout_seconds = {drain_seconds}",
            "[auth]", f'api_keys = ["{KEY}"]',
            "[rate_limit]", "enabled = false",
            "[[backends]]", 'name = "fleet"', 'protocol = "openai"',
            *(f"{key} = {json.dumps(value)}" for key, value in lines.items()),
        ]
    )  # fmt: skip


@dataclass
class Asked:
    """One request on a connection of its own."""

    seed: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def answer(self) -> tuple[int, bytes]:
        """Status and body; (0, b"") where the connection ends without a whole answer."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length:")[2].split()[0])
            return int(head.split()[1]), await self.reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, b""
        finally:
            self.writer.close()

    async def is_right(self) -> bool:
        """Whether the very picture that was asked for came."""
        status, body = await self.answer()
        if status != 200:
            return False
        drawn = base64.b64decode(json.loads(body)["data"][0]["b64_json"])
        return drawn == picture("a lighthouse", self.seed, 32, 32)

    def leave(self) -> float:
        """Close at once; returns when."""
        self.writer.transport.abort()
        return asyncio.get_running_loop().time()


async def ask(program: Program, seed: int) -> Asked:
    fields = {"prompt": "a lighthouse", "model": "m", "seed": seed, "size": "32x32", "response_format": "b64_json"}
    body = json.dumps(fields).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    writer.write(
        b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer sk-test\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    )
    return Asked(seed, reader, writer)


async def asked_at_once(program: Program, count: int) -> list[Asked]:
    return [await ask(program, seed) for seed in range(count)]


async def gauges(program: Program) -> dict[str, float]:
    """What a gateway with nothing to do must not hold, and must not have met."""
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    found: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition(" ")[0].partition("{")[0].removeprefix("img_serving_")
        if name in {"slots_in_use", "batches_running", "queue_depth", "internal_errors_total"}:
            found[name] = found.get(name, 0) + float(line.rpartition(" ")[2])
    assert len(found) >= 3
    return found


async def until(happened) -> None:
    """Another process's doing, that nothing announces."""
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110 - see above
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("step", ["hang", "500", "truncated_base64", "long_length", "refused"])
def test_a_server_that_fails_costs_no_client_its_picture_and_leaves_nothing_behind(step: str, tmp_path: Path) -> None:
    async def main() -> None:
        bad = ScriptedServer({"sequence": ["ok" if step == "refused" else step]})
        good = [ScriptedServer({"latency_seconds": 0.02}) for _ in range(SERVERS - 1)]
        for server in (bad, *good):
            await server.start()
        if step == "refused":
            await bad.stop()
        try:
            # long enough for a good server, and short enough to be waited for twice
            timeout_ms = 1000 if step == "hang" else 60_000
            with serving(tmp_path, configuration([bad, *good], timeout_ms=timeout_ms)) as program:
                for _ in range(2):
                    asked = await asked_at_once(program, 4 * SERVERS)
                    assert [await one.is_right() for one in asked] == [True] * len(asked)
                assert set((await gauges(program)).values()) == {0}
                assert program.stop() == 0
        finally:
            for server in (bad, *good):
                await server.stop()
        drawn = sum(len(server.posts) for server in good)
        assert drawn == 8 * SERVERS or step == "hang"  # no good server was asked twice for one picture
        assert all(post.ended_at is not None for post in bad.posts)
        assert bad.posts or step == "refused"
        assert "Traceback" not in program.log
        assert "Task was destroyed" not in program.log

    asyncio.run(main())


def test_while_one_of_five_servers_lives_every_client_gets_its_picture(tmp_path: Path) -> None:
    async def main() -> None:
        servers = [ScriptedServer({"latency_seconds": 0.02}) for _ in range(SERVERS)]
        for server in servers:
            await server.start()
        try:
            with serving(tmp_path, configuration(servers)) as program:
                assert all([await (await ask(program, seed)).is_right() for seed in range(SERVERS)])
                for server in servers[1:]:
                    await server.stop()
                asked = await asked_at_once(program, 20)
                assert [await one.is_right() for one in asked] == [True] * 20
                for server in servers[1:]:
                    await server.start()
                assert await (await ask(program, 1)).is_right()
        finally:
            for server in servers:
                await server.stop()

    asyncio.run(main())


def test_the_upstream_call_of_a_client_that_leaves_is_closed_soon(tmp_path: Path) -> None:
    async def main() -> None:
        over: asyncio.Queue[Exchange] = asyncio.Queue()

        def hear(exchange: Exchange) -> None:
            if exchange.method == "POST" and exchange.ended_at is not None:
                over.put_nowait(exchange)

        async with ScriptedServer({"sequence": ["hang"]}, tell=hear) as server:
            with serving(tmp_path, configuration([server])) as program:
                took = []
                for count in range(1, 12):
                    asked = await ask(program, count)
                    await until(lambda count=count: len(server.posts) == count)
                    left_at = asked.leave()
                    async with asyncio.timeout(10):
                        exchange = await over.get()
                    assert exchange.disconnected_at is not None
                    took.append(exchange.disconnected_at - left_at)
                assert statistics.median(took) < 0.1
                assert set((await gauges(program)).values()) == {0}

    asyncio.run(main())


def test_sigterm_answers_everybody_and_finishes_what_runs(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"latency_seconds": 0.3}) as server:
            with serving(tmp_path, configuration([server], drain_seconds=1, max_concurrency=2)) as program:
                asked = await asked_at_once(program, 12)
                await until(lambda: len(server.posts) == 2)
                program.process.send_signal(signal.SIGTERM)
                answers = [await one.answer() for one in asked]
                assert program.process.wait(timeout=20) == 0
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= 2
        assert all(json.loads(body)["error"]["code"] for status, body in answers if status == 503)
        assert "Traceback" not in program.log

    asyncio.run(main())


def test_a_second_sigterm_answers_everybody_at_once(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"sequence": ["hang"]}) as server:
            with serving(tmp_path, configuration([server], max_concurrency=2)) as program:
                asked = await asked_at_once(program, 4)
                await until(lambda: len(server.posts) == 2)
                program.process.send_signal(signal.SIGTERM)
                await asyncio.sleep(0.3)
                assert program.process.poll() is None
                program.process.send_signal(signal.SIGTERM)
                async with asyncio.timeout(5):  # the drain time is 15 s
                    assert [(await one.answer())[0] for one in asked] == [503] * 4
                assert program.process.wait(timeout=5) == 0
                await until(lambda: not server.in_flight)

    asyncio.run(main())
