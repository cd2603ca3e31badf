"""A compose profile's backend is in the gateway's list while the profile runs: against real programs."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socketserver
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from tests.support.fake_comfyui import FakeComfyUI
from tests.support.programs import Program, free_port, serving
from tests.support.workers import working

KEEPER = Path(__file__).parents[2] / "deploy" / "compose" / "keep_backend.py"
SECONDS = 60.0


class Keeper:
    """A running `keep_backend.py`."""

    def __init__(self, process: subprocess.Popen[str], directory: Path) -> None:
        self.process = process
        self.kept = directory / "kept"
        self._log = directory / "keeper.txt"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(SECONDS)


@contextmanager
def keeping(gateway_url: str, directory: Path, backend: dict[str, Any], **environment: str) -> Iterator[Keeper]:
    with (directory / "keeper.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, str(KEEPER), json.dumps(backend)],
            env={
                "PATH": "/usr/bin:/bin",
                "IMG_SERVING_URL": gateway_url,
                "IMG_SERVING_KEY_FILE": str(directory / "admin.env"),
                "KEPT_FILE": str(directory / "kept"),
                "LOOK_SECONDS": "0.2",
                **environment,
            },
            stdout=log,
            stderr=log,
            text=True,
        )
        try:
            yield Keeper(process, directory)
        finally:
            process.kill()
            process.wait(10)


@contextmanager
def gateway(directory: Path, config: str = "") -> Iterator[Program]:
    """As in the container: the key goes into a file."""
    key_file = directory / "admin.env"
    with serving(directory, config, environment={"IMG_SERVING_ENV_FILE": str(key_file)}) as program:
        if key_file.exists():
            program.key = key_file.read_text().strip().partition("=")[2]
        yield program


def eventually(what: Callable[[], Any], keeper: Keeper) -> Any:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        if (found := what()) is not None and found is not False:
            return found
        time.sleep(0.05)
    raise AssertionError(keeper.log)


def call(program: Program, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    request = urllib.request.Request(  # noqa: S310 - our own
        program.url + path,
        None if body is None else json.dumps(body).encode(),
        {"Authorization": f"Bearer {program.key}", "Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310 - our own
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def names(program: Program) -> list[str]:
    return [one["name"] for one in call(program, "GET", "/v1/backends")[1]["data"]]


def own(port: int, **more: Any) -> dict[str, Any]:
    return {"name": "worker", "protocol": "grpc", "endpoints": [f"grpc://127.0.0.1:{port}"], **more}


def removing(program: Program, directory: Path) -> subprocess.CompletedProcess[str]:
    environment = {"IMG_SERVING_URL": program.url, "IMG_SERVING_KEY_FILE": str(directory / "admin.env")}
    command = [sys.executable, str(KEEPER), "--remove", "worker"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.smoke
def test_a_worker_draws_until_it_is_removed_and_the_painter_again_afterwards(tmp_path: Path) -> None:
    with working("--model-name", "sdxl") as worker, gateway(tmp_path) as program:

        def drawn() -> Any:
            status, reply = call(program, "POST", "/v1/images/generations", {"prompt": "a", "size": "64x64"})
            return reply if status == 200 else None

        with keeping(program.url, tmp_path, own(worker.port)) as keeper:
            eventually(keeper.kept.exists, keeper)
            eventually(drawn, keeper)
            assert worker.metrics()['calls_total{outcome="ok"}'] >= 1
            assert keeper.stop() == 0
        assert names(program) == ["procedural", "worker"]
        done = removing(program, tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        assert names(program) == ["procedural"]
        assert drawn() is not None
        again = removing(program, tmp_path)
        assert again.returncode == 1
        assert "404" in again.stderr


@pytest.mark.smoke
def test_jobs_that_wait_when_everything_is_stopped_are_drawn_by_the_same_engine_afterwards(tmp_path: Path) -> None:
    port = free_port()
    with (
        working("--model-name", "sdxl", "--slots", "1", port=port),
        gateway(tmp_path) as program,
        keeping(program.url, tmp_path, own(port, max_concurrency=1, max_batch_size=1)) as keeper,
    ):
        eventually(lambda: "sdxl" in str(call(program, "GET", "/v1/models")[1]), keeper)
        body = {"model": "sdxl", "prompt": "a", "size": "1024x1024", "num_inference_steps": 150}
        jobs = [call(program, "POST", "/v1/jobs", {"operation": "generation", "body": body})[1] for _ in range(4)]
        assert keeper.stop() == 0
    with (
        gateway(tmp_path) as again,
        working("--model-name", "sdxl", port=port),
        keeping(again.url, tmp_path, own(port)) as keeper,
    ):

        def over() -> list[Any] | None:
            records = [call(again, "GET", f"/v1/jobs/{job['id']}")[1] for job in jobs]
            return records if all(one["finished_at"] for one in records) else None

        records = eventually(over, keeper)
    assert [(one["status"], one["backend"]) for one in records] == [("succeeded", "worker")] * 4


@pytest.mark.smoke
def test_a_comfyui_draws_while_it_is_kept(tmp_path: Path) -> None:
    async def main() -> None:
        async with FakeComfyUI() as comfyui:
            await asyncio.to_thread(draw, comfyui)

    def draw(comfyui: FakeComfyUI) -> None:
        backend = {"name": "comfyui", "protocol": "comfyui", "endpoints": [comfyui.url], "shared": True}
        with gateway(tmp_path) as program, keeping(program.url, tmp_path, backend) as keeper:
            asked = {"prompt": "a", "size": "64x64", "num_inference_steps": 1}

            def drawn() -> bool:  # until its models are known, the painter stands in
                return call(program, "POST", "/v1/images/generations", asked)[0] == 200 and bool(comfyui.drawn)

            eventually(drawn, keeper)

    asyncio.run(main())


@pytest.mark.smoke
def test_it_waits_for_the_gateway_and_for_its_key_and_puts_back_what_vanished(tmp_path: Path) -> None:
    first = tmp_path / "first"
    with gateway(first) as program:
        port = program.port
    with keeping(f"http://127.0.0.1:{port}", tmp_path, own(1)) as keeper:
        eventually(lambda: "no answer" in keeper.log, keeper)
        with serving(tmp_path, port=port, environment={"IMG_SERVING_ENV_FILE": str(tmp_path / "late.env")}) as program:
            eventually(lambda: "401" in keeper.log, keeper)
            assert "admin.env cannot be read: No such file" in keeper.log
            assert not keeper.kept.exists()
            (tmp_path / "late.env").rename(tmp_path / "admin.env")
            program.key = (tmp_path / "admin.env").read_text().strip().partition("=")[2]
            eventually(keeper.kept.exists, keeper)
            assert call(program, "DELETE", "/v1/backends/worker")[0] == 200
            eventually(lambda: "worker" in names(program), keeper)
        assert program.key not in keeper.log


@pytest.mark.smoke
def test_a_backend_at_another_address_is_left_alone_until_it_is_taken_out(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        assert call(program, "POST", "/v1/backends", own(1))[0] == 201
        with keeping(program.url, tmp_path, own(2), BACKEND_API_KEY="s3cret") as keeper:
            eventually(
                lambda: "another one has this name, grpc at grpc://127.0.0.1:1, and is left" in keeper.log, keeper
            )
            assert "take it out: keep_backend.py --remove worker" in keeper.log
            assert not keeper.kept.exists()
            assert call(program, "GET", "/v1/backends/worker")[1]["endpoints"][0]["url"].endswith(":1")
            assert removing(program, tmp_path).returncode == 0
            eventually(keeper.kept.exists, keeper)
            assert call(program, "GET", "/v1/backends/worker")[1]["endpoints"][0]["url"].endswith(":2")
            assert "s3cret" not in keeper.log
            assert keeper.stop() == 0
            assert not keeper.kept.exists()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "told",
    [
        {"endpoints": ["http://127.0.0.1:1/"]},
        {"endpoints": ["HTTP://LocalHost:1/v1/"], "protocol": "a1111"},
        {"endpoints": [{"url": "http://127.0.0.1:1/sub/"}, "http://127.0.0.1"], "protocol": "openai"},
    ],
)
def test_a_backend_is_added_once_however_its_address_is_spelled(tmp_path: Path, told: dict[str, Any]) -> None:
    def calls(program: Program) -> dict[str, int]:
        """To the backends, by method."""
        request = urllib.request.Request(f"{program.url}/metrics", headers={"Authorization": f"Bearer {program.key}"})  # noqa: S310 - our own
        with urllib.request.urlopen(request, timeout=SECONDS) as reply:  # noqa: S310 - our own
            found = re.findall(r'requests_total\{(route="/backends/?".*)\} (\d+)', reply.read().decode())
        counted: Counter[str] = Counter()
        for labels, count in found:
            counted[re.findall(r'method="(\w+)"', labels)[0]] += int(count)
        return counted

    def has_looked(program: Program, times: int) -> bool:
        return calls(program)["GET"] >= times

    with gateway(tmp_path) as program:
        for _ in range(2):  # by itself, and by a later run that did not add it
            with keeping(program.url, tmp_path, {"name": "worker", **told}) as keeper:
                eventually(keeper.kept.exists, keeper)
                seen = calls(program)["GET"]
                eventually(partial(has_looked, program, seen + 3), keeper)
                assert keeper.kept.exists()
                assert (calls(program)["POST"], calls(program).get("DELETE", 0)) == (1, 0)


@pytest.mark.smoke
def test_what_an_earlier_run_left_at_the_same_address_is_left_alone(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        assert call(program, "POST", "/v1/backends", own(1, weight=7))[0] == 201
        with keeping(program.url, tmp_path, own(1)) as keeper:
            eventually(keeper.kept.exists, keeper)
            assert call(program, "GET", "/v1/backends/worker")[1]["weight"] == 7


@pytest.mark.smoke
def test_a_backend_that_the_configuration_defines_is_left_alone(tmp_path: Path) -> None:
    config = '[[backends]]\nname = "worker"\nprotocol = "grpc"\nendpoints = ["grpc://127.0.0.1:3"]\n'
    with gateway(tmp_path, config) as program, keeping(program.url, tmp_path, own(2)) as keeper:
        eventually(keeper.kept.exists, keeper)
        assert keeper.stop() == 0
        assert "own configuration" in keeper.log
        (endpoint,) = call(program, "GET", "/v1/backends/worker")[1]["endpoints"]
        assert endpoint["url"].endswith(":3")


@pytest.mark.smoke
def test_a_key_of_the_operators_is_found_in_the_file_as_well(tmp_path: Path) -> None:
    """Where the configuration has keys, the gateway makes none, and writes the first admin key into its file."""
    with gateway(tmp_path, '[auth]\napi_keys = ["sk-of-the-operator"]\n') as program:
        assert program.key == "sk-of-the-operator"
        with keeping(program.url, tmp_path, own(1)) as keeper:
            eventually(keeper.kept.exists, keeper)


@pytest.mark.smoke
def test_what_the_gateway_does_not_take_is_said_with_its_reason(tmp_path: Path) -> None:
    with gateway(tmp_path) as program:
        bad = own(1, time_out=3)
        with keeping(program.url, tmp_path, bad) as keeper:
            eventually(lambda: "time_out" in keeper.log, keeper)
            assert not keeper.kept.exists()
            assert keeper.process.poll() is None


# --- what is no gateway, or a broken one


@contextmanager
def answering(reply: bytes) -> Iterator[tuple[str, list[bytes]]]:
    """A server that answers everything with `reply`; its address, and what it was asked."""
    asked: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            lines = list(iter(self.rfile.readline, b"\r\n"))
            asked.append(b"".join(lines))
            sizes = [int(line.split(b":")[1]) for line in lines if line.lower().startswith(b"content-length:")]
            self.rfile.read(sum(sizes))
            self.wfile.write(reply)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}", asked
        finally:
            server.shutdown()


def http_reply(body: bytes, status: str = "200 OK", *, missing: int = 0, more: str = "") -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body) + missing}\r\n{more}Connection: close\r\n\r\n"
    return head.encode() + body


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        *(
            (http_reply(body), "is no backend: is this the gateway?")
            for body in (
                b"5", b"[1]", b"null", b"{}", b'"text"',
                b'{"origin": "api", "protocol": "grpc", "endpoints": 5}',
                b'{"origin": "api", "protocol": "grpc", "endpoints": [5]}',
                b'{"origin": "api", "protocol": "grpc", "endpoints": [{"url": null}]}',
                b'{"origin": 1, "protocol": "grpc", "endpoints": []}',
            )
        ),
        (http_reply(b"[" * 200_000), "is not JSON"),
        (http_reply(b"\xff\xfe\x00"), "is not JSON"),
        (http_reply(b"{", missing=99), "yet: "),
        (b"garbage\r\n\r\n", "it speaks no HTTP, or broke off"),
        (b"", "it speaks no HTTP, or broke off"),
        (http_reply(b"{", "500 No", missing=99), "500 "),
        (http_reply(b"[]", "500 No"), "500 []"),
        (http_reply(b"[" * 200_000, "500 No"), "500 [["),
        (http_reply(b'{"error":{"message":"\\u001b[31mred\\nb: fine\\u009b"}}', "500 No"), r"500 \x1b[31mred\nb: fine\x9b"),
        (http_reply(b'{"error":{"message":"see http://me:pass@host/"}}', "500 No"), "see http://host/"),
    ],
)  # fmt: skip
def test_a_gateway_that_makes_no_sense_is_waited_for(tmp_path: Path, reply: bytes, said: str) -> None:
    with answering(reply) as (url, asked), keeping(url, tmp_path, own(1)) as keeper:
        eventually(lambda: len(asked) > 2, keeper)
        assert keeper.process.poll() is None
        (line,) = keeper.log.splitlines()
        assert line.startswith("backend worker: not in the gateway's list yet: ")
        assert said in line
        assert line.isprintable()
        assert not keeper.kept.exists()
        assert keeper.stop() == 0


def test_the_key_goes_to_the_gateway_alone(tmp_path: Path) -> None:
    with answering(http_reply(b"{}")) as (elsewhere, stolen):
        moved = http_reply(b"", "302 Found", more=f"Location: {elsewhere}/else\r\n")
        with (
            answering(moved) as (url, asked),
            keeping(
                url, tmp_path, own(1), IMG_SERVING_API_KEY="sk-s3cret", http_proxy=elsewhere, ALL_PROXY=elsewhere
            ) as keeper,
        ):
            eventually(lambda: "302 the gateway redirects, which is not followed" in keeper.log, keeper)
            assert b"Authorization: Bearer sk-s3cret" in asked[0]
        assert stolen == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe\x00\x80", "is not text"),
        (b"OTHER=1\n", "there is no IMG_SERVING_API_KEY in"),
        (b"IMG_SERVING_API_KEY=sk-s3\x01cret\n", "has characters that no key has"),
        ("IMG_SERVING_API_KEY=sk-s3cret…\n".encode(), "has characters that no key has"),
    ],
)
def test_a_key_file_without_a_key_is_told(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "admin.env").write_bytes(content)
    with answering(http_reply(b'{"error":{"message":"no key"}}', "401 No")) as (url, asked):
        with keeping(url, tmp_path, own(1)) as keeper:
            eventually(lambda: said in keeper.log, keeper)
            assert "401 no key (" in keeper.log
            assert "s3" not in keeper.log
            assert b"Authorization" not in asked[0]
        (tmp_path / "admin.env").write_bytes(b"IMG_SERVING_API_KEY = sk-s3cret \r\n")
        with keeping(url, tmp_path, own(1)) as keeper:
            eventually(lambda: b"Authorization: Bearer sk-s3cret\r\n" in asked[-1], keeper)


def test_a_key_of_the_environment_may_end_in_a_newline(tmp_path: Path) -> None:
    with (
        answering(http_reply(b"{}")) as (url, asked),
        keeping(url, tmp_path, own(1), IMG_SERVING_API_KEY="sk-s3cret\n") as keeper,
    ):
        eventually(lambda: bool(asked), keeper)
        assert b"Authorization: Bearer sk-s3cret\r\n" in asked[0]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("IMG_SERVING_API_KEY", "sk-s3\ncret", "IMG_SERVING_API_KEY has characters that no key has"),
        ("IMG_SERVING_API_KEY", "sk-s3cret…", "IMG_SERVING_API_KEY has characters that no key has"),
        ("IMG_SERVING_URL", "http://me:s3cret@127.0.0.1:1", "IMG_SERVING_URL has a name or password in it"),
        *(
            ("IMG_SERVING_URL", url, "IMG_SERVING_URL is no address of a gateway")
            for url in ("nonsense", "gateway:8080", "ftp://a", "http://", "http://a:b", "http://a:0", "http://a b", "http://[a")
        ),
        *(("LOOK_SECONDS", told, "LOOK_SECONDS is no number of seconds") for told in ("abc", "nan", "inf", "-1", "0")),
        ("KEPT_FILE", "/", "KEPT_FILE, /: "),
        ("KEPT_FILE", "/none/there", "KEPT_FILE, /none/there: No such file"),
    ],
)  # fmt: skip
def test_a_setting_that_cannot_be_right_is_one_line(tmp_path: Path, name: str, value: str, said: str) -> None:
    with keeping("http://127.0.0.1:1", tmp_path, own(1), **{name: value}) as keeper:
        assert keeper.process.wait(SECONDS) == 2
        (line,) = keeper.log.splitlines()
        assert line.startswith(f"keep_backend: {said}")
        assert "s3" not in line


@pytest.mark.parametrize("name", ["", " ", "a\nb", "\udc80"])
def test_a_name_that_is_none_is_misuse(name: str) -> None:
    for arguments in ([json.dumps({"name": name})], ["--remove", name]):
        done = subprocess.run([sys.executable, str(KEEPER), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("arguments", [[], ["worker"], ["[]"], ['{"protocol": "grpc"}'], ["{}", "{}"], ["[" * 50_000]])
def test_an_argument_that_is_no_backend_is_misuse(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, str(KEEPER), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "one argument is needed" in done.stderr
