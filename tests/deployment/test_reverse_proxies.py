"""The files in deploy/proxies, each given to the real proxy in front of a real gateway.

What a backend must have been told, or must not, is asked of the backend; "at once" means: while the backend is still held.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.event_streams import form
from tests.support.fake_a1111 import FakeA1111
from tests.support.programs import Program, free_port, serving
from tests.support.proxies import FILES, HOST, SNIPPETS, Proxy, answer_on, preferring_http_2, proxying, send
from tests.support.threads import in_a_thread

from img_serving.backends.stub_server import Answer, Exchange, StubServer
from img_serving.media.png import SIGNATURE

pytestmark = pytest.mark.smoke

KEY = "sk-behind-a-proxy"
STEPS = 4
DRAWN = {"model": "tiny-a", "prompt": "a lighthouse", "size": "64x64", "num_inference_steps": STEPS}
PAINTED = {"model": "painted", "prompt": "a lighthouse", "size": "64x64"}
DRAW = "/v1/images/generations"
EDIT = "/v1/images/edits"
METRICS = (
    *("/metrics", "/metrics/", "/metrics?x=1", "/metrics%2f", "/metrics%2F", "/%6detrics", "/%6Detrics/?x"),
    *("/v1/metrics", "/v1/metrics/", "/v1/%6Detrics", "/v1%2fmetrics", "/%76%31/metric%73", "/v1/metrics%2F"),
)
"""What a gateway that strips `/v1` and a slash at the end, and decodes, takes for its metrics."""
NEARLY_METRICS = (
    *("//metrics", "/metrics//", "/v1//metrics", "//v1/metrics", "/./metrics", "/x/../metrics", "/v1/../metrics"),
    *("/x/%2e%2e/metrics", "/METRICS", "/V1/Metrics", "/v1/v1/metrics", "/%256detrics", "/metrics%23x", "/metrics;x"),
)
"""What is not that, unless somebody on the way tidies it up."""

CONFIG = f"""
[server]
trusted_proxies = ["127.0.0.1"]
keepalive_after_seconds = 1
[auth]
api_keys = ["{KEY}"]
[[backends]]
name = "painter"
protocol = "builtin"
models = ["painted"]
[[backends]]
name = "engine"
protocol = "a1111"
endpoints = ["%s"]
models = ["tiny-a"]
"""


SPOKEN = {"nginx": "2", "haproxy": "1.1", "caddy": "2"}
"""The version of HTTP that a client gets who prefers HTTP/2."""


class Turnstile(asyncio.Event):
    """Lets an engine take so many steps and no more, until it is opened for good (which `/interrupt` does, too)."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    async def wait(self) -> Any:
        """One step, once it may be taken."""
        while not self.is_set() and self._steps == 0:  # noqa: ASYNC110 - it is let from another thread
            await asyncio.sleep(0.01)
        self._steps = max(0, self._steps - 1)
        return True

    def let(self, steps: int) -> None:
        """So many more, from any thread."""
        self._steps += steps


class Recorder(StubServer):
    """An upstream that only listens, and answers every request in one manner."""

    def __init__(self, answer: Answer | None = None) -> None:
        super().__init__()
        self.said = answer or Answer(200, b"{}")

    async def answer(self, exchange: Exchange) -> Answer:
        return Answer(self.said.status, self.said.body, self.said.headers, self.said.manner)


@pytest.fixture(scope="module")
def engine() -> Iterator[FakeA1111]:
    with in_a_thread(FakeA1111()) as fake:
        yield fake


@pytest.fixture
def turnstile(engine: FakeA1111) -> Iterator[Turnstile]:
    """The engine stands still until it is let; at the end it goes on."""
    gate = engine.gate = Turnstile()
    yield gate
    engine.gate = None
    gate.let(1000)
    until(lambda: engine.in_flight == 0)


@pytest.fixture(scope="module")
def gateway(engine: FakeA1111, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with serving(tmp_path_factory.mktemp("gateway"), CONFIG % engine.url) as program:
        yield program


@pytest.fixture(scope="module", params=FILES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def proxy(name: str, gateway: Program, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    with proxying(name, tmp_path_factory.mktemp(name), gateway.port) as running:
        yield running


def until(holds: Callable[[], bool]) -> None:
    """Wait for it, for as long as a busy machine may take."""
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it never came to hold"
        time.sleep(0.02)


def read_until(connection: http.client.HTTPResponse, found: bytes) -> bytes:
    """The beginning of a body, up to the piece that `found` is in."""
    data = b""
    while found not in data:
        piece = connection.read1()
        assert piece, f"the body ended before {found!r}: {data[-200:]!r}"
        data += piece
    return data


# what goes through as it comes


def test_an_event_arrives_before_the_next_one_is_made(proxy: Proxy, turnstile: Turnstile) -> None:
    connection = proxy.connect()
    turnstile.let(2)
    send(connection, "POST", DRAW, key=KEY, body={**DRAWN, "stream": True, "partial_images": 1})
    answered = connection.getresponse()
    seen = read_until(answered, b"partial_image_index")
    assert b".completed" not in seen
    turnstile.let(STEPS)
    read_until(answered, b"event: image_generation.completed")
    connection.close()


def test_the_blanks_that_keep_a_reply_open_arrive_while_the_picture_is_drawn(
    proxy: Proxy, turnstile: Turnstile
) -> None:
    connection = proxy.connect()
    send(connection, "POST", DRAW, key=KEY, body=DRAWN)
    answered = connection.getresponse()
    assert answered.status == 200
    blanks = answered.read1(100)
    assert blanks.strip() == b""
    assert blanks
    turnstile.let(STEPS)
    assert json.loads(answered.read())["data"]
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_gone_for_the_engine(
    proxy: Proxy, engine: FakeA1111, turnstile: Turnstile, stream: bool
) -> None:
    before = engine.interrupts
    connection = proxy.connect()
    send(connection, "POST", DRAW, key=KEY, body={**DRAWN, "prompt": f"left, {stream}", "stream": stream})
    until(lambda: engine.in_flight > 0)
    turnstile.let(1)
    connection.close()
    until(lambda: engine.interrupts == before + 1)


# with HTTP/2 where it is offered, as browsers and some client libraries ask


def test_an_event_arrives_before_the_next_one_is_made_for_a_client_of_http_2_too(
    proxy: Proxy, turnstile: Turnstile
) -> None:
    turnstile.let(2)
    with preferring_http_2(proxy, DRAW, key=KEY, body={**DRAWN, "stream": True, "partial_images": 1}) as curl:
        assert curl.stdout is not None
        lines = iter(curl.stdout)
        seen = [next(lines) for _ in range(2)]
        assert seen[0].startswith(b"event: image_generation.partial_image")
        turnstile.let(STEPS)
        rest = list(lines)
        assert any(line.startswith(b"event: image_generation.completed") for line in rest)
        assert rest[-1] == f"200/{SPOKEN[proxy.name]}".encode()


def test_a_client_of_http_2_that_leaves_is_gone_for_the_engine(
    proxy: Proxy, engine: FakeA1111, turnstile: Turnstile
) -> None:
    before = engine.interrupts
    with preferring_http_2(proxy, DRAW, key=KEY, body={**DRAWN, "prompt": "left by a client of HTTP/2"}):
        until(lambda: engine.in_flight > 0)
        turnstile.let(1)
    until(lambda: engine.interrupts == before + 1)


def test_a_gateway_that_is_not_there_is_told_of_to_a_client_of_http_2(name: str, tmp_path: Path) -> None:
    """Several times: over HTTP/2, an answer that comes before the request is whole is a cancelled stream, now and then."""
    with proxying(name, tmp_path / name, free_port()) as proxy:
        for _ in range(15):
            with preferring_http_2(proxy, DRAW, key=KEY, body=PAINTED) as curl:
                said = curl.communicate()[0].decode()
            assert said.endswith((f"502/{SPOKEN[name]}", f"503/{SPOKEN[name]}")), said
            assert json.loads(said.rpartition("\n")[0])["error"]["code"] == "gateway_unreachable"


# bodies


def test_a_gateway_that_is_not_there_is_told_of_to_a_client_that_is_still_sending(name: str, tmp_path: Path) -> None:
    """One that sends a prompt of 12 KB in several pieces, and reads then."""
    size, pieces = 12_000, 6
    head = f"POST {DRAW} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {size}\r\n\r\n"
    with proxying(name, tmp_path / name, free_port()) as proxy, proxy.socket() as connection:
        connection.sendall(head.encode())
        for _ in range(pieces):
            time.sleep(0.1)  # the proxy has the time to answer, should it want to
            connection.sendall(b"x" * (size // pieces))
        answered = answer_on(connection)
    assert answered.status in {502, 503}
    assert answered.json["error"]["code"] == "gateway_unreachable"


def noise(mebibytes: int) -> bytes:
    """A PNG of about that size, which nothing can make smaller."""
    from io import BytesIO

    from PIL import Image

    side = int((mebibytes * 2**20 / 3) ** 0.5) + 1
    pixels = np.random.default_rng(7).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = BytesIO()
    Image.fromarray(pixels).save(file, "png", compress_level=0)
    return file.getvalue()


def test_an_upload_of_20_mib_passes_and_stays_off_the_disk(proxy: Proxy) -> None:
    bodies = proxy.directory / "bodies"
    before = bodies.stat().st_mtime_ns if proxy.name == "nginx" else 0
    body, headers = form({"model": "painted", "prompt": "x", "size": "64x64"}, {"image": noise(20)})
    assert len(body) > 20 * 2**20
    answered = proxy.ask("POST", EDIT, key=KEY, body=body, headers=headers)
    assert answered.status == 200, answered.body[:300]
    assert answered.json["data"][0]["url"]
    if proxy.name == "nginx":
        assert bodies.stat().st_mtime_ns == before, "a file was made there"


def test_what_is_over_64_mib_gets_the_gateways_own_413(proxy: Proxy) -> None:
    """The gateway answers by the length alone. The client reads, as most do, also when it could not send everything."""
    length = 64 * 2**20 + 1
    _, headers = form({}, {})
    lines = {"Host": HOST, "Authorization": f"Bearer {KEY}", "Content-Length": str(length), **headers}
    head = f"POST {EDIT} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    with proxy.socket() as connection:
        connection.sendall(head.encode())
        try:
            for _ in range(64):
                connection.sendall(bytes(2**20))
        except OSError:
            pass  # nobody wanted to hear the rest
        answered = answer_on(connection)
    assert answered.status == 413
    error = answered.json["error"]
    assert error["code"] == "payload_too_large"
    assert "67108864" in error["message"]


# who asked, and under which name


def test_the_urls_of_pictures_are_the_proxys_and_download_through_it(proxy: Proxy) -> None:
    url = proxy.ask("POST", DRAW, key=KEY, body=PAINTED).json["data"][0]["url"]
    assert url.startswith(f"{proxy.url}/images/")
    picture = proxy.ask("GET", url.removeprefix(proxy.url))
    assert picture.status == 200
    assert picture.headers["content-type"] == "image/png"
    assert picture.body.startswith(SIGNATURE)


def test_what_a_client_claims_of_its_origin_does_not_get_into_urls(proxy: Proxy) -> None:
    claimed = {
        "X-Forwarded-Host": "evil.example",
        "X-Forwarded-Proto": "http",
        "X-Forwarded-Port": "666",
        "X-Forwarded-Prefix": "/evil",
        "X-Forwarded-For": "203.0.113.9",
    }
    url = proxy.ask("POST", DRAW, key=KEY, body=PAINTED, headers=claimed).json["data"][0]["url"]
    assert url.startswith(f"{proxy.url}/images/")


def test_a_request_id_passes_both_ways(proxy: Proxy) -> None:
    assert (
        proxy.ask("GET", "/v1/models", key=KEY, headers={"X-Request-Id": "mine-7"}).headers["x-request-id"] == "mine-7"
    )
    refused = proxy.ask("GET", "/v1/models", headers={"X-Request-Id": "mine-8"})
    assert (refused.status, refused.headers["x-request-id"]) == (401, "mine-8")
    assert refused.json["error"]["code"]


@pytest.mark.parametrize("path", [*METRICS, *NEARLY_METRICS])
def test_the_metrics_are_not_for_everybody(proxy: Proxy, path: str) -> None:
    answered = proxy.ask("GET", path)
    assert answered.status == 404, answered.body[:100]
    assert b"img_serving_" not in answered.body


def test_without_a_proxy_the_metrics_would_be_there(gateway: Program) -> None:
    with gateway.connect() as connection:
        connection.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("path", ["/v1/models", "/models/", "/v1/%6Dodels"])
def test_the_api_is_there_in_the_same_spellings(proxy: Proxy, path: str) -> None:
    assert proxy.ask("GET", path, key=KEY).status == 200


def test_plain_http_is_sent_to_https(proxy: Proxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.plain_port, timeout=30)
    connection.request("GET", "/docs", headers={"Host": HOST})
    answered = connection.getresponse()
    assert answered.status == 308
    assert str(answered.getheader("location")).startswith(f"https://{HOST}")
    connection.close()


# in front of an upstream that writes down what it is sent


@pytest.fixture
def in_front_of(name: str, tmp_path: Path) -> Iterator[Callable[[Answer | None], tuple[Proxy, Recorder]]]:
    from contextlib import ExitStack

    with ExitStack() as stack:

        def start(answer: Answer | None) -> tuple[Proxy, Recorder]:
            recorder = stack.enter_context(in_a_thread(Recorder(answer)))
            return stack.enter_context(proxying(name, tmp_path / name, recorder.port)), recorder

        yield start


InFrontOf = Callable[[Answer | None], tuple[Proxy, Recorder]]


def test_the_gateway_is_told_who_asks_and_nothing_that_a_client_claims(in_front_of: InFrontOf) -> None:
    proxy, recorder = in_front_of(None)
    forged = {f"X-Forwarded-{one}": "203.0.113.9" for one in ("For", "Proto", "Host", "Port", "Prefix")}
    assert proxy.ask("GET", "/livez", headers=forged).status == 200
    told = recorder.exchanges[-1].headers
    assert told["host"] == told["x-forwarded-host"] == f"{HOST}:{proxy.port}"
    assert told["x-forwarded-for"] == "127.0.0.1"
    assert told["x-forwarded-proto"] == "https"
    assert not told.keys() & {"x-forwarded-port", "x-forwarded-prefix"}


def test_the_gateway_is_never_asked_for_its_metrics(in_front_of: InFrontOf) -> None:
    """Whatever an older gateway, or one of another configuration, would say to it."""
    proxy, recorder = in_front_of(None)
    for path in METRICS:
        assert proxy.ask("GET", path).status == 404, path
    assert [one.path for one in recorder.exchanges] == []
    assert proxy.ask("GET", "/v1/models").status == 200
    assert len(recorder.exchanges) == 1


def test_connections_to_the_gateway_are_kept(in_front_of: InFrontOf) -> None:
    proxy, recorder = in_front_of(None)
    connection = proxy.connect()
    for _ in range(5):
        send(connection, "POST", DRAW, body={"prompt": "x"})
        assert connection.getresponse().read() == b"{}"
    connection.close()
    assert len(recorder.exchanges) == 5
    assert recorder.connections == 1


def test_a_head_of_12_kib_passes(in_front_of: InFrontOf) -> None:
    proxy, _ = in_front_of(Answer(200, b"{}", {"x-long": "a" * 12 * 1024}))
    answered = proxy.ask("GET", "/livez")
    assert answered.status == 200
    assert len(answered.headers["x-long"]) == 12 * 1024


@pytest.mark.parametrize("headers", [{}, {"Idempotency-Key": "order-1"}], ids=["plain", "with a key"])
def test_a_post_that_breaks_off_is_not_sent_again(in_front_of: InFrontOf, headers: dict[str, str]) -> None:
    """The upstream hears all of it and hangs up without a word, and would hear it a second time.

    It is sent in one piece: HAProxy can only repeat what it has whole before the first byte goes on.
    """
    proxy, recorder = in_front_of(Answer(200, b"", manner="close"))
    body = b'{"prompt": "x"}'
    lines = {"Host": HOST, "Content-Length": str(len(body)), **headers}
    head = f"POST {DRAW} HTTP/1.1\r\n" + "".join(f"{name}: {value}\r\n" for name, value in lines.items()) + "\r\n"
    with proxy.socket() as connection:
        connection.sendall(head.encode() + body)
        answered = answer_on(connection)
    assert answered.status == 502
    assert answered.json["error"]["code"] == "gateway_unreachable"
    assert [one.method for one in recorder.exchanges] == ["POST"]


def test_a_post_of_a_client_that_prefers_http_2_is_not_sent_again_either(in_front_of: InFrontOf) -> None:
    """A stream that is refused as "not processed" is sent again by the client, whatever the proxy itself does not do."""
    proxy, recorder = in_front_of(Answer(200, b"", manner="close"))
    with preferring_http_2(proxy, DRAW, key=KEY, body={"prompt": "x"}) as curl:
        said = curl.communicate()[0].decode()
    assert said.endswith(f"502/{SPOKEN[proxy.name]}"), said
    assert json.loads(said.rpartition("\n")[0])["error"]["code"] == "gateway_unreachable"
    assert [one.method for one in recorder.exchanges] == ["POST"]


def test_a_post_that_breaks_off_on_a_kept_connection_is_not_sent_again_either(in_front_of: InFrontOf) -> None:
    """A connection that has served before is where proxies like to try again. HAProxy then hangs up, the others say 502."""
    proxy, recorder = in_front_of(None)
    connection = proxy.connect()
    send(connection, "POST", DRAW, body={"prompt": "x"}, headers={"Idempotency-Key": "order-1"})
    assert connection.getresponse().read() == b"{}"
    recorder.said = Answer(200, b"", manner="close")
    send(connection, "POST", DRAW, body={"prompt": "y"}, headers={"Idempotency-Key": "order-2"})
    if proxy.name == "haproxy":
        with pytest.raises(http.client.RemoteDisconnected):
            connection.getresponse()
    else:
        with connection.getresponse() as answered:
            assert answered.status == 502
    connection.close()
    assert len(recorder.exchanges) == 2
    assert recorder.connections == 1


def test_haproxy_serves_a_connection_once_where_the_page_says_so(tmp_path: Path) -> None:
    text = (SNIPPETS / FILES["haproxy"]).read_text()
    closing = text.replace("frontend img_serving\n", "frontend img_serving\n    option httpclose\n")
    for snippet, said in ((text, None), (closing, "close")):
        with (
            in_a_thread(Recorder()) as recorder,
            proxying("haproxy", tmp_path / str(said), recorder.port, snippet=snippet) as proxy,
        ):
            assert proxy.ask("POST", DRAW, body={"prompt": "x"}).headers.get("connection") == said


# a gateway that dies and comes back


def test_a_dead_gateway_is_told_of_at_once_and_a_new_one_is_used_at_once(
    name: str, engine: FakeA1111, turnstile: Turnstile, tmp_path: Path
) -> None:
    port = free_port()
    config = CONFIG.replace("keepalive_after_seconds = 1", "keepalive_after_seconds = 0") % engine.url
    with proxying(name, tmp_path / name, port) as proxy:
        with serving(tmp_path / "gateway", config, port=port) as program:
            posts = len(engine.posts)
            said: list[Any] = []
            asking = threading.Thread(target=lambda: said.append(proxy.ask("POST", DRAW, key=KEY, body=DRAWN)))
            asking.start()
            until(lambda: len(engine.posts) == posts + 1)
            program.process.kill()
            asking.join(30)
            assert [one.status for one in said] == [502]
        began = time.monotonic()
        gone = proxy.ask("POST", DRAW, key=KEY, body=DRAWN)
        assert gone.status in {502, 503}
        assert gone.json["error"]["code"] == "gateway_unreachable"
        assert time.monotonic() - began < 20
        turnstile.let(1000)
        with serving(tmp_path / "gateway", config, port=port):
            assert proxy.ask("POST", DRAW, key=KEY, body=PAINTED).status == 200
        assert len(engine.posts) == posts + 1, "the picture of the dead gateway was asked for again"
