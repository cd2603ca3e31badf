"""Malformed bodies, headers and paths: never a 500, never a hang, never a crash, always the error object."""

from __future__ import annotations

import json
import string
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.asgi import Reply
from tests.support.gateways import running, scripted
from tests.support.virtual_time import run_virtual

from img_serving.api.generation import KNOWN_FIELDS

TOML = "[rate_limit]\nenabled = false\n[limits]\nmax_pixels = 65536\n" + scripted("one", backend__default_size="16x16")

quick = settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])

text = st.text(max_size=40)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | text
    | st.sampled_from(["1024x1024", "auto", "0x0", "9" * 400 + "x1", "url", "b64_json", "png", "\x00", "\u202e", "💥"])
)
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3))
bodies = st.dictionaries(st.sampled_from(sorted(KNOWN_FIELDS)) | text, values, max_size=8)
header_text = st.text(alphabet=[chr(code) for code in range(1, 256) if chr(code) not in "\r\n"], max_size=60)


def check(reply: Reply) -> None:
    assert reply.status not in {0, 500}, reply
    assert reply.headers["x-request-id"]
    if reply.status >= 400:
        assert reply.error["message"]


def ask(method: str, path: str, **options: Any) -> Reply:
    async def main() -> Reply:
        async with running(TOML) as gateway:
            return await gateway.client.request(method, path, **options)

    return run_virtual(main())


@quick
@given(bodies)
def test_any_json_object(fields: dict[str, Any]) -> None:
    raw = json.dumps({"prompt": "a lighthouse", **fields}).encode()
    reply = ask("POST", "/v1/images/generations", raw=raw, headers={"content-type": "application/json"})
    check(reply)
    assert reply.status in {200, 400, 404, 413}


@quick
@given(st.binary(max_size=300) | values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes(raw: bytes) -> None:
    reply = ask("POST", "/v1/images/generations", raw=raw, headers={"content-type": "application/json"})
    check(reply)
    assert reply.status in {200, 400}


@quick
@given(bodies)
def test_any_backend_body(fields: dict[str, Any]) -> None:
    raw = json.dumps(fields).encode()
    reply = ask("POST", "/v1/backends", raw=raw, headers={"content-type": "application/json"})
    check(reply)
    assert reply.status == 400


@quick
@given(
    st.sampled_from(["GET", "POST", "DELETE", "HEAD", "OPTIONS", "PUT", "BREW"]),
    st.sampled_from(["/", "/v1/", "/images/", "/v1/models/", "/v1/backends/", "/v1/images/generations/"]),
    st.text(alphabet=string.printable + "가/%\x00é", max_size=60),
)
def test_any_path(method: str, prefix: str, rest: str) -> None:
    reply = ask(method, prefix + rest.replace("?", ""))
    assert reply.status not in {0, 500}
    if reply.status >= 400 and method != "HEAD":
        check(reply)


@quick
@given(
    st.dictionaries(
        st.sampled_from(
            [
                "authorization", "x-api-key", "x-request-id", "content-type", "content-length", "host", "range",
                "if-none-match", "if-range", "x-forwarded-for", "x-forwarded-host", "x-forwarded-proto", "traceparent",
                "expect", "origin", "access-control-request-headers", "x-stainless-retry-count", "accept",
            ]
        ),
        header_text,
        max_size=6,
    )
)  # fmt: skip
def test_any_headers(headers: dict[str, str]) -> None:
    for path in ("/v1/models", "/images/00000000000000000000000000000000.png"):
        check(ask("GET", path, headers=headers))
    reply = ask("POST", "/v1/images/generations", raw=b'{"prompt": "x"}', headers=headers)
    check(reply)
    for name, value in reply.header_list:
        assert b"\r" not in value
        assert b"\n" not in value
        assert name == name.lower()
