"""`health`: ready is 0, everything else is 1 with one line."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.support.programs import free_port, serving

from img_serving.cli import main

Out = pytest.CaptureFixture[str]


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.strip()


def test_a_gateway_that_is_ready_is_0(gateway: Any, capsys: Out) -> None:
    gateway.answer(200, {"status": "ok"})
    assert main(["health"]) == 0
    assert one_line(capsys.readouterr().out) == f"{gateway.url} is ready"
    assert [(one.method, one.path) for one in gateway.asked] == [("GET", "/readyz")]
    assert "authorization" not in gateway.asked[0].headers


def test_a_gateway_that_drains_is_1_and_says_why(gateway: Any, capsys: Out) -> None:
    gateway.refuse(503, "the server is stopping")
    assert main(["health"]) == 1
    assert "the server is stopping" in one_line(capsys.readouterr().err)


def test_what_is_no_gateway_is_1(gateway: Any, capsys: Out) -> None:
    gateway.answer(404, b"nothing here")
    assert main(["health", "--url", gateway.url]) == 1
    assert "is there an img-serving gateway" in one_line(capsys.readouterr().err)


def test_nobody_there_is_1(capsys: Out) -> None:
    assert main(["health", "--url", f"http://127.0.0.1:{free_port()}"]) == 1
    assert "nothing listens" in one_line(capsys.readouterr().err)


def test_an_answer_is_waited_for_as_long_as_asked(capsys: Out) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it is connected to, and never says a word
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["health", "--url", url, "--timeout", "0.2"]) == 1
    assert "did not answer within 0.2 s" in one_line(capsys.readouterr().err)


def test_an_answer_that_trickles_is_not_waited_for_longer(capsys: Out) -> None:
    def trickle(listener: socket.socket, stop: threading.Event) -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            while not stop.wait(0.05):
                connection.sendall(b" ")

    stop = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        pool.submit(trickle, listener, stop)
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            assert main(["health", "--url", url, "--timeout", "0.5"]) == 1
        finally:
            stop.set()
    assert "did not answer within 0.5 s" in one_line(capsys.readouterr().err)


def test_any_number_of_seconds_can_be_asked_for(gateway: Any) -> None:
    gateway.answer(200, {"status": "ok"})
    assert main(["health", "--timeout", "1e300"]) == 0


@pytest.mark.parametrize(
    ("host", "asked"),
    [("0.0.0.0", "http://127.0.0.1"), ("::", "http://[::1]"), ("127.0.0.2", "http://127.0.0.2")],
)
def test_without_a_url_the_configured_port_of_this_machine_is_asked(
    host: str, asked: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    port = free_port()
    Path("config").mkdir()
    Path("config/default.toml").write_text(f'[server]\nhost = "{host}"\nport = 1\n')
    monkeypatch.setenv("IMG_SERVING__SERVER__PORT", str(port))
    assert main(["health"]) == 1
    assert f"{asked}:{port}" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("IMG_SERVING__SERVER__PORT", "0", "name the gateway with --url"),
        ("IMG_SERVING__SERVER__PROT", "1", "server.prot"),
        ("IMG_SERVING_CONFIG", "nowhere.toml", "nowhere.toml"),
        ("IMG_SERVING_URL", "http://[", "URL"),
        ("IMG_SERVING_URL", "grpc://a b", "URL"),
    ],
)
def test_what_cannot_be_asked_is_1_and_never_2(
    name: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setenv(name, value)
    assert main(["health"]) == 1
    assert said in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("status", "code", "said"), [("SERVING", 0, "is ready"), ("NOT_SERVING", 1, "still being loaded")]
)
def test_a_worker_is_ready_when_its_model_is_loaded(status: str, code: int, said: str) -> None:
    pytest.importorskip("grpc")
    import grpc
    from grpc_health.v1 import health, health_pb2, health_pb2_grpc

    service = health.HealthServicer()
    service.set("", health_pb2.HealthCheckResponse.ServingStatus.Value(status))
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        health_pb2_grpc.add_HealthServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            # another process, as in life
            ended = subprocess.run(
                [sys.executable, "-m", "img_serving", "health", "--url", f"grpc://127.0.0.1:{port}", "--timeout", "30"],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
        finally:
            server.stop(None).wait(10)
    assert ended.returncode == code
    assert said in one_line(ended.stdout + ended.stderr)


def test_a_worker_that_is_not_there_is_1() -> None:
    pytest.importorskip("grpc")
    ended = subprocess.run(
        [sys.executable, "-m", "img_serving", "health", "--url", f"grpc://127.0.0.1:{free_port()}", "--timeout", "5"],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "does not answer" in one_line(ended.stderr)


def test_a_real_gateway_is_ready(tmp_path: Path) -> None:
    with serving(tmp_path / "gateway") as program:
        ended = subprocess.run(
            [sys.executable, "-m", "img_serving", "health", "--url", program.url],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert (ended.returncode, ended.stderr) == (0, "")


def test_asking_loads_no_server_and_no_engine() -> None:
    script = (
        "import sys; from img_serving.cli import main; main(['health', '--url', 'http://127.0.0.1:1'])\n"
        "print([one for one in ('uvicorn', 'rich', 'numpy', 'PIL', 'grpc', 'img_serving.main') if one in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"
