"""Headers, queries, ids in paths and receivers of webhooks: whatever stands there is read, ignored or refused by its name."""

from __future__ import annotations

import json
import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.edge import Edge, EdgeReply, fuzzing, head

from img_serving.domain.errors import InvalidRequest
from img_serving.policy.webhooks import check_webhook_url

pytestmark = pytest.mark.smoke

HEADER_TEXT = st.text(alphabet=[chr(code) for code in range(1, 256) if chr(code) not in "\r\n"], max_size=40).map(
    lambda text: text.encode("latin-1")
)
"""What an HTTP parser lets through, and more: it may refuse it."""


def draw(target: Edge, headers: dict[str, Any], **fields: Any) -> EdgeReply:
    body = {"prompt": "a fox", "model": "script", "size": "32x32", **fields}
    sent = {"Content-Type": "application/json", **headers}
    return target.ask("POST", "/v1/images/generations", json.dumps(body).encode(), headers=sent)


@pytest.fixture(scope="module")
def job_id(target: Edge) -> str:
    """A job that is over."""
    reply = target.json("/v1/jobs", {"operation": "generation", "body": {"prompt": "x", "model": "script"}})
    found = str(json.loads(reply.body)["id"])
    assert b"job.succeeded" in target.ask("GET", f"/v1/jobs/{found}/events").body
    return found


# headers

KEYS = [
    b"",
    b" ",
    b"a" * 255,
    b"a" * 256,
    b"a" * 60_000,
    b"\xff",
    b"\x00",
    b"\x7f",
    b"a b",
    b"../..",
    b"'; DROP TABLE jobs;--",
    b"%00",
    "열쇠".encode(),
]


@pytest.mark.parametrize("key", KEYS, ids=lambda one: ascii(one[:30]))
def test_any_idempotency_key(target: Edge, key: bytes) -> None:
    replies = [draw(target, {"Idempotency-Key": key}) for _ in range(2)]
    assert {one.status for one in replies} <= {200, 400}
    assert len({one.status for one in replies}) == 1
    if replies[0].status == 200:
        assert replies[1].headers["idempotent-replayed"] == "true"
    listed = target.ask("GET", "/v1/jobs?idempotency_key=" + quote(key[:5000]))
    assert listed.status == 200
    assert len(json.loads(listed.body)["data"]) == (
        1 if replies[0].status == 200 else len(json.loads(listed.body)["data"])
    )


@fuzzing(60)
@given(HEADER_TEXT, st.sampled_from(["generation", "edit"]))
def test_any_idempotency_key_for_a_job(target: Edge, key: bytes, operation: str) -> None:
    body = {"operation": operation, "body": {"prompt": "x", "model": "script"}}
    reply = target.ask(
        "POST",
        "/v1/jobs",
        json.dumps(body).encode(),
        headers={"Content-Type": "application/json", "Idempotency-Key": key},
    )
    assert reply.status in {202, 400, 409, 422}


PREFER = [
    b"respond-async",
    b"RESPOND-ASYNC, wait=10",
    b"respond-async;x=y",
    b"wait=99999999999999999999",
    b'x="respond-async"',
    b"return=minimal",
    b", , ,respond-async",
    b"respond-async" * 4000,
    b"," * 60_000,
    b" " * 60_000,
    b"\xff",
    b"respond-asynchronously",
    b"handling=strict;respond-async",
]


@pytest.mark.parametrize("prefer", PREFER, ids=lambda one: ascii(one[:30]))
def test_any_preference(target: Edge, prefer: bytes) -> None:
    reply = draw(target, {"Prefer": prefer})
    assert reply.status in {200, 202, 400}
    assert ("preference-applied" in reply.headers) == (reply.status == 202)
    assert reply.seconds < 5


LAST_IDS = [
    b"0",
    b"-1",
    b"1",
    b"9" * 18,
    b"9" * 19,
    b"9" * 20,
    b"9" * 5000,
    b"1e3",
    b"0x1",
    b" 1 ",
    b"\xb2",
    b"\xff",
    b"",
    b"job_x",
    b"1,2",
    "١".encode(),
]


@pytest.mark.parametrize("last", LAST_IDS, ids=lambda one: ascii(one[:30]))
def test_any_last_event_id(target: Edge, job_id: str, last: bytes) -> None:
    reply = target.ask("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": last})
    assert reply.status == 200
    told = next(line[4:] for line in reply.body.decode().split("\n") if line.startswith("id: "))
    assert target.ask("GET", f"/v1/jobs/{job_id}/events", headers={"Last-Event-ID": told}).status == 204
    assert target.ask("GET", "/v1/jobs/job_unknown/events", headers={"Last-Event-ID": last}).status == 404


OWN_HEADERS = [
    "Idempotency-Key",
    "Prefer",
    "Last-Event-ID",
    "X-Stainless-Retry-Count",
    "X-Stainless-Timeout",
    "X-Stainless-Lang",
    "X-Stainless-Async",
    "X-Request-Id",
    "Traceparent",
    "Tracestate",
    "Content-Type",
    "Content-Encoding",
    "Expect",
    "Accept",
    "Accept-Encoding",
    "Range",
    "If-None-Match",
    "If-Range",
    "Origin",
    "Access-Control-Request-Headers",
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Api-Key",
    "Authorization",
    "OpenAI-Organization",
    "Connection",
    "Upgrade",
    "Te",
    "Trailer",
    "Host",
    "Cookie",
]


@fuzzing(150)
@given(
    st.dictionaries(st.sampled_from(OWN_HEADERS), HEADER_TEXT, max_size=5),
    st.sampled_from(
        [
            ("POST", "/v1/images/generations"),
            ("POST", "/v1/jobs"),
            ("GET", "/v1/jobs"),
            ("GET", "/v1/webhooks"),
            ("GET", "/v1/models"),
            ("GET", "/images/x.png"),
        ]
    ),
)
def test_any_headers(target: Edge, headers: dict[str, bytes], route: tuple[str, str]) -> None:
    method, path = route
    body = b'{"prompt": "x", "model": "script", "operation": "generation", "body": {"prompt": "x", "model": "script"}}'
    reply = target.ask(method, path, body if method == "POST" else b"", headers=headers)
    assert not any("\n" in value for value in reply.headers.values())


@pytest.mark.parametrize("name", ["X-Stainless-Retry-Count", "X-Stainless-Timeout", "X-Stainless-Read-Timeout"])
@pytest.mark.parametrize("value", ["0", "1", "-1", "1e999", "nan", "99999999999999999999", "", "x" * 10_000, "²"])
def test_what_client_libraries_tell_of_themselves(target: Edge, name: str, value: str) -> None:
    assert draw(target, {name: value}).status == 200


@pytest.mark.parametrize(
    "value",
    [
        "a" * 128,
        "a" * 129,
        "a b",
        "\x7f",
        "req\tx",
        "<script>",
        "'; DROP TABLE jobs;--",
        "요청",
        "${jndi:ldap://x}",
        "%0d%0aX-Injected: 1",
    ],
    ids=ascii,
)
def test_a_request_id_is_a_clients_own_or_ours(target: Edge, value: str) -> None:
    reply = draw(target, {"X-Request-Id": value})
    assert reply.status in {200, 400}
    assert reply.headers["x-request-id"] == value or reply.headers["x-request-id"].startswith("req_")
    assert target.ask("GET", f"/v1/jobs?request_id={quote(value)}").status == 200


def test_heads_that_are_too_much(target: Edge) -> None:
    for headers in (
        {"X": "y" * 70_000},
        {f"X-{index}": "y" for index in range(10_000)},
        {"x" * 70_000: "y"},
        {"Cookie": ";" * 60_000},
    ):
        reply = target.request("GET", "/v1/models", headers=headers)
        assert reply.status in {200, 400, 431}
        target.check(reply)
    target.check_memory(32 << 20)


RAW = [
    b"\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET /\r\n\r\n",
    b"GET  / HTTP/1.1\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET / HTTP/1.1\nHost: x\n\n",
    b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    b"GET / HTTP/1.1\r\n Host: x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n",
    b"GET / HTTP/1.1\r\nX: \x00\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01",
    b"CONNECT gateway.test:80 HTTP/1.1\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http:// HTTP/1.1\r\n\r\n",
    b"GET http://[::1 HTTP/1.1\r\n\r\n",
    b"GET //..//..//etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /images/../../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\xff" * 100,
    bytes(100),
    b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"GET /?" + b"a=b&" * 15_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    b"A" * 70_000,
    b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /%ff%fe%00 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /#x HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET ?x HTTP/1.1\r\n\r\n",
]


@pytest.mark.parametrize("raw", RAW, ids=lambda one: ascii(one[:30]))
def test_what_is_hardly_http(target: Edge, raw: bytes) -> None:
    reply = target.send(raw, ends=True)
    if reply.status:
        target.check(reply)
        assert b"root:" not in reply.body


# queries

QUERIES = [
    "limit=0",
    "limit=-1",
    "limit=101",
    "limit=1000",
    "limit=10000",
    "limit=0001" + "9" * 30,
    "limit=" + "0" * 5000 + "1",
    "limit=" + "9" * 5000,
    "limit=1e1",
    "limit=%00",
    "limit=٣",
    "limit=²",
    "limit=",
    "limit",
    "limit=1&limit=2",
    "status=",
    "status=x",
    "status=QUEUED",
    "status=queued%00",
    "operation=delete",
    "after=",
    "after=x",
    "after=%00",
    "after=job_" + "0" * 5000,
    "after=%ff%fe",
    "after=%ed%a0%80",
    "idempotency_key=%00",
    "idempotency_key=" + "k" * 5000,
    "request_id=%27%20OR%201=1--",
    "request_id=%00",
    "x=y",
    "&&&&",
    "=&=&=",
    "&".join(f"a{index}=b" for index in range(65)),
    "%",
    "%zz",
    "status[]=queued",
    "after=job_x&limit=100&status=failed&operation=edit&idempotency_key=x&request_id=y",
    "state=",
    "state=x",
    "job_id=%00",
    "job_id=" + "j" * 5000,
]


@pytest.mark.parametrize("query", QUERIES, ids=lambda one: ascii(one[:30]))
def test_any_filter_of_a_list(target: Edge, query: str) -> None:
    for path in ("/v1/jobs", "/v1/webhooks", "/v1/models", "/v1/backends", "/v1/queue"):
        reply = target.ask("GET", f"{path}?{query}")
        assert reply.status in {200, 400, 404}, reply
        if reply.status == 400:
            assert reply.error["param"] in {"limit", "status", "operation", "after", "state", None}


@fuzzing(150)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["limit", "status", "operation", "after", "idempotency_key", "request_id", "state", "job_id"]
            ),
            st.text(max_size=30)
            | st.integers().map(str)
            | st.sampled_from(["queued", "succeeded", "edit", "job_", "1", "100"]),
        ),
        max_size=4,
    ),
    st.sampled_from(["/v1/jobs", "/v1/webhooks"]),
)
def test_any_filters_of_a_list(target: Edge, pairs: list[tuple[str, str]], path: str) -> None:
    query = "&".join(f"{name}={quote(value.encode('utf-8', 'surrogatepass'))}" for name, value in pairs)
    assert target.ask("GET", f"{path}?{query}").status in {200, 400, 404}


# ids in paths

IDS = [
    "%00",
    "job_%00",
    "%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "..",
    "../..",
    "a/b/c",
    "%2F",
    "events",
    "events/events",
    "job_x/events/",
    "job_x/events/x",
    "%ff",
    "%ed%a0%80",
    "%EC%9E%91%EC%97%85",
    "x" * 5000,
    "%F0%9F%92%A5",
    "'%20OR%201=1--",
    "*",
    "%25",
    "%0d%0aX-Injected:%201",
    "job_x%2Fevents",
    ";",
    "job_x;a=b",
    "%",
    "%zz",
    "?",
    "",
    "{id}",
    "null",
    "true",
    "-1",
    "__proto__",
    "..%5c..%5cwindows",
    "con",
    ".hidden",
    "~",
    "/",
    "//",
    "data%2Fgateway.db",
    "generated_images",
]


@pytest.mark.parametrize("name", IDS, ids=lambda one: ascii(one[:40]))
def test_any_id_in_a_path(target: Edge, name: str) -> None:
    for method, path in (
        ("GET", "/v1/jobs/{}"),
        ("DELETE", "/v1/jobs/{}"),
        ("GET", "/v1/jobs/{}/events"),
        ("GET", "/v1/webhooks/{}"),
        ("POST", "/v1/webhooks/{}/redeliver"),
        ("GET", "/v1/models/{}"),
        ("GET", "/v1/backends/{}"),
        ("DELETE", "/v1/backends/{}"),
        ("GET", "/images/{}"),
        ("HEAD", "/images/{}"),
    ):
        reply = target.ask(method, path.format(name))
        assert reply.status in {200, 400, 404, 405}, reply
        assert "x-injected" not in reply.headers
        assert b"root:" not in reply.body
        if reply.status == 200:
            assert name in {"", "/", "//", "?", "..", "../.."}, "an id that nobody has"


@fuzzing(120)
@given(
    st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW", "get", "M-SEARCH"]),
    st.sampled_from(
        [
            "/v1/jobs/",
            "/v1/webhooks/",
            "/v1/models/",
            "/v1/backends/",
            "/images/",
            "/v1/images/",
            "/",
            "/v1",
            "//v1/jobs/",
        ]
    ),
    st.text(
        alphabet=string.printable.replace("\r", "").replace("\n", "").replace(" ", "").replace("\t", "") + "가é%",
        max_size=40,
    ),
)
def test_any_method_on_any_path(target: Edge, method: str, prefix: str, rest: str) -> None:
    reply = target.request(method, prefix + rest)
    if reply.status:
        target.check(reply)
    if method == "TRACE":
        assert reply.status in {0, 400, 404, 405}


# receivers of webhooks

REFUSED = [
    "",
    " ",
    "javascript:alert(1)",
    "file:///etc/passwd",
    "ftp://example.invalid/",
    "gopher://example.invalid/",
    "data:text/html,x",
    "//example.invalid/",
    "https:/example.invalid",
    "https:example.invalid",
    "https://",
    "https:///x",
    "http://user:secret@example.invalid/",
    "https://@example.invalid/",
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.1/",
    "https://0177.0.0.1/",
    "https://0/",
    "https://0.0.0.0/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:7f00:1]/",
    "https://[fe80::1%25lo]/",
    "https://[fe80::1%lo]/",
    "https://[fc00::1]/",
    "https://[64:ff9b::7f00:1]/",
    "https://[2002:7f00:1::]/",
    "https://[::127.0.0.1]/",
    "https://[v1.x]/",
    "https://[/",
    "https://]/",
    "https://[]/",
    "https://10.0.0.1/",
    "https://169.254.169.254/latest/meta-data",
    "https://192.168.0.1/",
    "https://172.16.0.1/",
    "https://100.64.0.1/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://a.localhost/",
    "https://127.0.0.1./",
    "https://１２７.0.0.1/",
    "https://①②⑦.0.0.1/",
    "https://127。0。0。1/",
    "https://example.invalid:0/",
    "https://example.invalid:65536/",
    "https://example.invalid:-1/",
    "https://example.invalid:x/",
    "https://example.invalid:/",
    "https://example.invalid\\@127.0.0.1/",
    "https://example.invalid\r\nX: y",
    "https://example.invalid/\x00",
    "https://exa mple.invalid/",
    "https://\u202e.invalid/",
    "https://example.invalid/" + "a" * 2048,
    "https://" + "a." * 1500 + "invalid/",
    "https://%31%32%37.0.0.1/",
    "https://-/",
    "https://.../",
    "https://\ud800/",
]
"""None of them is called, or looked up."""


@pytest.mark.parametrize("url", REFUSED, ids=lambda one: ascii(one[:50]))
def test_a_receiver_that_cannot_be(target: Edge, url: str) -> None:
    """Refused where the job is made, in a body or beside it; a password in it is not repeated."""
    body = {"prompt": "x", "model": "script"}
    for reply in (
        target.json("/v1/jobs", {"operation": "generation", "body": body, "webhook_url": url}),
        target.json("/v1/jobs", {"operation": "generation", "body": {**body, "webhook_url": url}}),
        target.json("/v1/images/generations", {**body, "webhook_url": url}, Prefer="respond-async"),
    ):
        assert reply.status == 400, reply
        assert b"secret" not in reply.body
        told = reply.error["param"] or reply.error["message"]
        assert "webhook_url" in told or ("not valid JSON" in told and not url.isprintable()), told


@pytest.mark.parametrize("value", [1, True, [], {}, ["https://example.invalid/"], 1e308], ids=ascii)
def test_a_receiver_that_is_no_text(target: Edge, value: Any) -> None:
    body = {"prompt": "x", "model": "script"}
    assert target.json("/v1/jobs", {"operation": "generation", "body": body, "webhook_url": value}).status == 400


_URL_PARTS = st.sampled_from(
    [
        "http",
        "https",
        "file",
        "://",
        ":",
        "/",
        "//",
        "@",
        "[",
        "]",
        "%",
        "%25",
        "127.0.0.1",
        "127.1",
        "0x7f",
        "::1",
        "::ffff:",
        "localhost",
        "example.invalid",
        ".",
        "..",
        ":80",
        ":99999",
        "\\",
        "?",
        "#",
        "\x00",
        "\n",
        " ",
        "\u3002",
        "\uff11",
        "\u202e",
        "xn--",
        "a" * 300,
        "-",
        "_",
        "\ud800",
    ]
)


@fuzzing(1000)
@given(st.lists(_URL_PARTS | st.text(max_size=3), max_size=10).map("".join))
def test_a_receiver_is_fit_or_refused(url: str) -> None:
    try:
        check_webhook_url(url, allow_private=False)
    except InvalidRequest:
        return
    assert url.lower().startswith(("http://", "https://"))
    assert url.isascii()
    assert url.isprintable()


def test_two_requests_on_one_connection_stay_two(target: Edge) -> None:
    """A body is no request, however much it looks like one."""
    smuggled = head("DELETE", "/v1/backends/script", 0)
    body = b'{"prompt": "x", "model": "script"}'
    for extra in (
        {"Content-Length ": "0"},
        {"Transfer-Encoding": "chunked"},
        {"Transfer-Encoding": "xchunked"},
        {"Transfer-Encoding": "identity"},
    ):
        raw = head(
            "POST", "/v1/images/generations", len(body + smuggled), {"Content-Type": "application/json", **extra}
        )
        reply = target.send(raw + body + smuggled, ends=True)
        if reply.status:
            target.check(reply)
            assert 400 <= reply.status < 500
        assert target.ask("GET", "/v1/backends/script").status == 200
