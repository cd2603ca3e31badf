"""The real program between real sockets: a client on one side, upstream servers that misbehave on the other."""

from __future__ import annotations

import asyncio
import http.client
import json
import time
from pathlib import Path
from typing import Any, TypeVar

import pytest
from tests.support.programs import Program, serving

from img_serving.backends.scripted_server import ScriptedServer

pytestmark = pytest.mark.smoke

Result = TypeVar("Result")
KEY = "sk-test"


def backend(name: str, *urls: str, protocol: str = "openai", **more: Any) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in more.items()]
    return "\n".join(
        ["[[backends]]", f'name = "{name}"', f'protocol = "{protocol}"', f"endpoints = {list(urls)}", *lines]
    )


def draw(program: Program, **fields: Any) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", program.port, timeout=30)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    body = {"prompt": "a lighthouse", "size": "32x32", "response_format": "b64_json", **fields}
    try:
        connection.request("POST", "/v1/images/generations", json.dumps(body), headers)
        reply = connection.getresponse()
        return reply.status, {name.lower(): value for name, value in reply.headers.items()}, json.loads(reply.read())
    finally:
        connection.close()


async def beside(work: Any, *arguments: Any, **named: Any) -> Any:
    """Run blocking client code while the scripted servers go on."""
    return await asyncio.get_running_loop().run_in_executor(None, lambda: work(*arguments, **named))


def configured(*backends: str) -> str:
    return "\n".join([f'[auth]\napi_keys = ["{KEY}"]', *backends]) + "\n"


def test_a_client_that_leaves_closes_its_upstream_call_within_a_second(tmp_path: Path) -> None:
    def leave_soon(program: Program) -> None:
        body = json.dumps({"prompt": "x", "model": "m"}).encode()
        with program.connect() as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer sk-test\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            )
            time.sleep(0.5)

    async def main() -> None:
        async with ScriptedServer({"sequence": ["hang"]}) as server:
            with serving(tmp_path, configured(backend("up", server.url, models=["m"]))) as program:
                await beside(leave_soon, program)
                left = asyncio.get_running_loop().time()
                for _ in range(100):
                    if server.posts and server.posts[0].disconnected_at is not None:
                        break
                    await asyncio.sleep(0.02)
                assert server.posts[0].disconnected_at is not None
                assert server.posts[0].disconnected_at - left < 1

    asyncio.run(main())


def test_an_upstream_that_fails_is_called_once_and_the_next_one_draws(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"sequence": ["500"]}) as bad, ScriptedServer() as good:
            with serving(tmp_path, configured(backend("up", bad.url, good.url, models=["m"]))) as program:
                for _ in range(3):
                    status, headers, _ = await beside(draw, program, model="m")
                    assert status == 200
                    assert headers["x-backend"] == "up"
                assert len(good.posts) == 3
                assert len(bad.posts) <= 3

    asyncio.run(main())


def test_one_request_to_failing_upstreams_makes_at_most_max_attempts_calls(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"sequence": ["500"]}) as one, ScriptedServer({"sequence": ["500"]}) as two:
            with serving(tmp_path, configured(backend("up", one.url, two.url, models=["m"]))) as program:
                status, headers, body = await beside(draw, program, model="m")
                assert status == 502
                assert headers["x-should-retry"] == "false"
                assert body["error"]["code"] == "backend_failed"
                assert len(one.posts) + len(two.posts) == 2

    asyncio.run(main())


def test_an_a1111_server_is_found_out_without_generating_and_draws(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"faces": ["a1111"], "models": ["sdxl"]}) as server:
            with serving(tmp_path, configured(backend("sd", server.url, protocol="http"))) as program:
                status, headers, body = await beside(draw, program, seed=5, n=2)
                assert status == 200
                assert headers["x-backend"] == "sd"
                assert [one["seed"] for one in body["data"]] == [5, 6]
                assert [one.path for one in server.posts] == ["/sdapi/v1/txt2img"] * len(server.posts)

    asyncio.run(main())


def test_a_client_that_leaves_is_heard_also_after_a_big_body_or_behind_a_second_request(tmp_path: Path) -> None:
    big = json.dumps({"prompt": "x", "model": "m", "note": "y" * 70_000}).encode()
    small = json.dumps({"prompt": "x", "model": "m"}).encode()

    def ask(program: Program, body: bytes, then: bytes) -> None:
        with program.connect() as connection:
            connection.sendall(
                b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                b"Authorization: Bearer sk-test\r\nContent-Length: %d\r\n\r\n" % len(body)
            )
            time.sleep(0.1)
            connection.sendall(body)
            time.sleep(0.4)
            connection.sendall(then)
            time.sleep(0.1)

    async def main() -> None:
        async with ScriptedServer({"sequence": ["hang"]}) as server:
            with serving(tmp_path, configured(backend("up", server.url, models=["m"]))) as program:
                for count, (body, then) in enumerate(
                    [(big, b""), (small, b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")], 1
                ):
                    await beside(ask, program, body, then)
                    for _ in range(50):
                        if len(server.posts) == count and server.posts[-1].disconnected_at is not None:
                            break
                        await asyncio.sleep(0.02)
                    assert len(server.posts) == count
                    assert server.posts[-1].disconnected_at is not None

    asyncio.run(main())


def test_a_password_is_never_quoted_whatever_the_upstream_says(tmp_path: Path) -> None:
    async def main() -> None:
        async with ScriptedServer({"sequence": ["500"], "echo": "wrong password pwSECRET-3"}) as server:
            config = configured(backend("up", server.url, models=["m"], username="user1", password="pwSECRET-3"))
            with serving(tmp_path, config) as program:
                _, _, body = await beside(draw, program, model="m")
                assert "SECRET" not in json.dumps(body)
                assert "SECRET" not in program.log

    asyncio.run(main())
