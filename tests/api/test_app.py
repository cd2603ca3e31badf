"""What holds for every route: keys, limits, errors, request ids, CORS."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import pytest
from tests.support.asgi import Client
from tests.support.gateways import ADMIN, running, scripted
from tests.support.virtual_time import run_virtual

ONE = scripted("one", backend__default_size="16x16")

USERS = """
[[auth.api_keys]]
name = "kim"
key = "sk-kim"
role = "user"
"""


@pytest.mark.parametrize("path", ["/health", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs", "/"])
def test_public_routes_need_no_key(path: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            assert (await gateway.nobody.get(path)).status == 200
            assert (await gateway.nobody.request("HEAD", path)).status == 200

    run_virtual(main())


def test_the_metrics_are_at_one_path_alone() -> None:
    """A rule of a proxy in front for `/metrics` then says all that there is to say."""

    async def main() -> None:
        async with running(ONE) as gateway:
            assert (await gateway.nobody.get("/metrics")).status == 200
            for path in ("/metrics/", "/v1/metrics", "/v1/metrics/", "//metrics", "/v1//metrics", "/METRICS"):
                reply = await gateway.client.get(path)
                assert (reply.status, reply.error["code"]) == (404, "unknown_path"), path
            for path in ("/v1/health", "/livez/", "/models", "/v1/models/"):
                assert (await gateway.client.get(path)).status == 200, path

    run_virtual(main())


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/images/generations"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/x"),
        ("GET", "/v1/backends"),
        ("POST", "/v1/backends"),
        ("DELETE", "/v1/backends/one"),
    ],
)
def test_without_a_good_key_it_is_401(method: str, path: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            wrong = {
                "none": {},
                "unknown": {"Authorization": "Bearer sk-wrong"},
                "empty": {"Authorization": "Bearer "},
                "bare": {"Authorization": ""},
                "basic": {"Authorization": "Basic YTpi"},
                "other": {"X-API-Key": "sk-wrong"},
                "prefix": {"Authorization": f"Bearer {ADMIN[:-1]}"},
                "longer": {"Authorization": f"Bearer {ADMIN}x"},
                "latin": {"Authorization": "Bearer \xff\xfe"},
            }
            for headers in wrong.values():
                reply = await gateway.nobody.request(method, path, headers=headers)
                assert reply.status == 401, headers
                assert reply.error["code"] == "invalid_api_key"
                assert reply.headers["www-authenticate"].startswith("Bearer")
                assert "sk-wrong" not in reply.body.decode()

    run_virtual(main())


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {ADMIN}"},
        {"Authorization": f"bearer {ADMIN}"},
        {"Authorization": f"BEARER   {ADMIN}"},
        {"X-API-Key": ADMIN},
        {"Authorization": "", "X-API-Key": ADMIN},
        {"Authorization": "Basic YTpi", "X-API-Key": ADMIN},
    ],
)
def test_a_key_travels_as_bearer_or_as_x_api_key(headers: dict[str, str]) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            assert (await gateway.nobody.get("/v1/models", headers=headers)).status == 200

    run_virtual(main())


def test_a_user_draws_but_does_not_manage() -> None:
    async def main() -> None:
        async with running(USERS + ONE) as gateway:
            kim = Client(gateway.gateway.app, "sk-kim")
            assert (await kim.draw()).status == 200
            for method, path in (("GET", "/v1/backends"), ("POST", "/v1/backends"), ("DELETE", "/v1/backends/one")):
                reply = await kim.request(method, path)
                assert reply.status == 403
                assert reply.error["type"] == "invalid_request_error"

    run_virtual(main())


def test_with_auth_off_nobody_needs_a_key() -> None:
    async def main() -> None:
        async with running("[auth]\nenabled = false\n" + ONE) as gateway:
            assert (await gateway.nobody.draw()).status == 200
            assert (await gateway.nobody.draw(headers=None)).status == 200
            assert (await gateway.nobody.get("/v1/backends", headers={"Authorization": "Bearer "})).status == 200

    run_virtual(main())


def test_metrics_can_be_made_private() -> None:
    async def main() -> None:
        async with running("[auth]\nmetrics_public = false\n" + USERS + ONE) as gateway:
            assert (await gateway.nobody.get("/metrics")).status == 401
            assert (await Client(gateway.gateway.app, "sk-kim").get("/metrics")).status == 403
            assert (await gateway.client.get("/metrics")).status == 200

    run_virtual(main())


def test_the_bucket_of_a_key_refuses_refills_and_is_told() -> None:
    async def main() -> None:
        async with running("[rate_limit]\nrequests_per_second = 2\nburst_size = 3\n" + USERS + ONE) as gateway:
            replies = [await gateway.client.get("/v1/models") for _ in range(5)]
            assert [one.status for one in replies] == [200, 200, 200, 429, 429]
            assert [one.headers["x-ratelimit-remaining-requests"] for one in replies[:3]] == ["2", "1", "0"]
            assert replies[0].headers["x-ratelimit-limit-requests"] == "3"
            refused = replies[3]
            assert refused.error["code"] == "rate_limit_exceeded"
            assert refused.headers["retry-after"] == "1"
            assert refused.headers["retry-after-ms"] == "500"
            assert (await Client(gateway.gateway.app, "sk-kim").get("/v1/models")).status == 200
            await asyncio.sleep(0.5)
            assert (await gateway.client.get("/v1/models")).status == 200
            assert (
                'img_serving_rate_limited_total{scope="key"} 2' in (await gateway.nobody.get("/metrics")).body.decode()
            )

    run_virtual(main())


def test_limits_can_be_off_global_by_address_and_by_key() -> None:
    async def main() -> None:
        async with running("[rate_limit]\nenabled = false\n" + ONE) as gateway:
            replies = [await gateway.client.get("/v1/models") for _ in range(300)]
            assert {one.status for one in replies} == {200}
            assert "x-ratelimit-limit-requests" not in replies[0].headers
        toml = "[rate_limit.address]\nrequests_per_second = 1\nburst_size = 2\n"
        async with running(toml + ONE) as gateway:
            assert [(await gateway.client.get("/v1/models")).status for _ in range(3)] == [200, 200, 429]
            other = Client(gateway.gateway.app, ADMIN, address="10.0.0.9")
            assert (await other.get("/v1/models")).status == 200
        toml = "[rate_limit.global]\nrequests_per_second = 1\nburst_size = 2\n"
        async with running(toml + ONE) as gateway:
            other = Client(gateway.gateway.app, ADMIN, address="10.0.0.9")
            assert [(await one.get("/v1/models")).status for one in (gateway.client, other, other)] == [200, 200, 429]
        toml = """
[[auth.api_keys]]
name = "slow"
key = "sk-slow"
rate_limit = { requests_per_second = 1, burst_size = 1 }
"""
        async with running(toml + ONE) as gateway:
            slow = Client(gateway.gateway.app, "sk-slow")
            assert [(await slow.get("/v1/models")).status for _ in range(2)] == [200, 429]
            assert (await gateway.client.get("/v1/models")).status == 200

    run_virtual(main())


def test_a_refused_call_is_never_read() -> None:
    """A caller without a key, or over its limit, costs no body bytes beyond the 64 KiB that let the answer arrive."""

    async def main() -> None:
        async with running(ONE) as gateway:
            huge = [b"x" * 65536 for _ in range(100)]
            reply = await gateway.nobody.post(
                "/v1/images/generations", chunks=huge, headers={"content-length": str(65536 * 100)}
            )
            assert reply.status == 401
            assert reply.headers["connection"] == "close"
            small = await gateway.nobody.post("/v1/images/generations", {"prompt": "x"})
            assert small.status == 401
            assert "connection" not in small.headers

    run_virtual(main())


def test_a_body_over_the_limit_is_413() -> None:
    async def main() -> None:
        async with running("[server]\nmax_body_bytes = 1000\n" + ONE) as gateway:
            declared = await gateway.client.draw(prompt="x" * 2000)
            assert declared.status == 413
            assert declared.error["code"] == "payload_too_large"
            chunked = await gateway.client.post(
                "/v1/images/generations",
                chunks=[b"x" * 600, b"x" * 600],
                headers={"content-type": "application/json", "transfer-encoding": "chunked"},
            )
            assert chunked.status == 413
            assert (await gateway.client.draw(prompt="x" * 500)).status == 200

    run_virtual(main())


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"])
def test_another_media_type_is_415(kind: str) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            reply = await gateway.client.post(
                "/v1/images/generations", raw=b'{"prompt": "x"}', headers={"content-type": kind}
            )
            assert reply.status == 415
            assert "application/json" in reply.error["message"]

    run_virtual(main())


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json", None]
)
def test_json_by_any_of_its_names_is_read(kind: str | None) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            headers = {"content-type": kind} if kind else {}
            reply = await gateway.client.post("/v1/images/generations", raw=b'{"prompt": "x"}', headers=headers)
            assert reply.status == 200

    run_virtual(main())


def test_unknown_paths_and_methods_are_errors_of_the_same_shape() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            for path in ("/nope", "/v1/nope", "/v1", "/v2/models", "/v1/v1/models", "/images"):
                reply = await gateway.nobody.get(path)
                assert reply.status == 404, path
                assert reply.error["code"]
                assert reply.headers["x-request-id"]
            for method, path, allow in (
                ("GET", "/v1/images/generations", "OPTIONS, POST"),
                ("DELETE", "/v1/models", "GET, HEAD, OPTIONS"),
                ("PUT", "/v1/backends/one", "DELETE, GET, HEAD, OPTIONS"),
                ("BREW", "/health", "GET, HEAD, OPTIONS"),
                ("DELETE", "/v1/jobs/job_x/events", "GET, HEAD, OPTIONS"),
                ("POST", "/v1/webhooks/evt_x", "GET, HEAD, OPTIONS"),
                ("GET", "/v1/webhooks/evt_x/redeliver", "OPTIONS, POST"),
            ):
                reply = await gateway.client.request(method, path)
                assert reply.status == 405
                assert reply.headers["allow"] == allow
                assert reply.error["code"] == "method_not_allowed"

    run_virtual(main())


def test_an_unexpected_exception_is_a_500_of_the_same_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with running(ONE) as gateway:

            def broken(*_: Any, **__: Any) -> None:
                raise RuntimeError("secret detail")

            monkeypatch.setattr(type(gateway.gateway.services.pipeline), "admit", broken)
            reply = await gateway.client.draw()
            assert reply.status == 500
            assert reply.error["code"] == "internal_error"
            assert reply.headers["x-request-id"] in reply.error["message"]
            assert "secret detail" not in reply.body.decode()

    run_virtual(main())


def test_options_answers_without_a_key_and_cors_only_for_allowed_origins() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            bare = await gateway.nobody.request("OPTIONS", "/v1/images/generations")
            assert bare.status == 204
            assert bare.headers["allow"] == "OPTIONS, POST"
            asked = await gateway.client.get("/v1/models", headers={"Origin": "https://app.example"})
            assert "access-control-allow-origin" not in asked.headers
        toml = '[server]\ncors_allow_origins = ["https://app.example"]\n'
        async with running(toml + ONE) as gateway:
            preflight = await gateway.nobody.request(
                "OPTIONS",
                "/v1/images/generations",
                headers={"Origin": "https://app.example", "Access-Control-Request-Method": "POST"},
            )
            assert preflight.headers["access-control-allow-origin"] == "https://app.example"
            assert "POST" in preflight.headers["access-control-allow-methods"]
            assert "authorization" in preflight.headers["access-control-allow-headers"]
            reply = await gateway.client.get("/v1/models", headers={"Origin": "https://app.example"})
            assert reply.headers["access-control-allow-origin"] == "https://app.example"
            refused = await gateway.nobody.draw()
            assert refused.status == 401
            other = await gateway.client.get("/v1/models", headers={"Origin": "https://evil.example"})
            assert "access-control-allow-origin" not in other.headers

    run_virtual(main())


def test_the_first_byte_of_a_dripped_body_starts_a_clock() -> None:
    async def main() -> None:
        async with running(ONE) as gateway:
            never = asyncio.Event()

            async def receive() -> dict[str, Any]:
                if not sent:
                    sent.append(1)
                    return {"type": "http.request", "body": b"{", "more_body": True}
                await never.wait()
                raise AssertionError

            sent: list[int] = []
            replies: list[MutableMapping[str, Any]] = []

            async def send(message: MutableMapping[str, Any]) -> None:
                replies.append(message)

            scope = {
                "type": "http", "method": "POST", "path": "/v1/images/generations", "scheme": "http",
                "headers": [(b"authorization", f"Bearer {ADMIN}".encode()), (b"transfer-encoding", b"chunked")],
                "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8080),
            }  # fmt: skip
            await gateway.gateway.app(scope, receive, send)
            assert replies[0]["status"] == 400
            assert (b"connection", b"close") in replies[0]["headers"]

    run_virtual(main())
