"""`img-serving backends probe`: what is told of an address, and the configuration that comes of it."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.fake_a1111 import FakeA1111
from tests.support.fake_kserve import FakeKServe, Flavour
from tests.support.fake_worker import FakeWorker
from tests.support.threads import in_a_thread

from img_serving.backends.scripted_server import ScriptedServer
from img_serving.cli import main
from img_serving.config import backend_from_mapping
from img_serving.media.sniff import check_picture

Probe = Callable[..., tuple[int, str, str]]


@pytest.fixture
def probe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Probe:
    """Run it; returns the exit code and what it said on either stream."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    def run(*words: str) -> tuple[int, str, str]:
        code = main(["backends", "probe", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def block_of(out: str) -> dict[str, object]:
    """The table that is to be pasted."""
    table: dict[str, object] = tomllib.loads(out[out.index("[[backends]]") :])["backends"][0]
    return table


def test_what_speaks_there_is_told_and_the_block_can_be_pasted(probe: Probe) -> None:
    with in_a_thread(FakeA1111()) as server:
        code, out, _ = probe(server.url, "--no-draw")
    assert code == 0
    assert "Forge" in out
    assert "tiny-a, tiny-b" in out
    assert "multiples of 8, others rounded down" in out
    assert "Euler a" in out
    assert "can be stopped" in out
    table = block_of(out)
    assert (table["protocol"], table["endpoints"]) == ("a1111", [server.url])
    assert backend_from_mapping(table).name == table["name"]
    assert not server.posts


def test_a_test_picture_is_drawn_only_where_somebody_agrees(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_a_thread(FakeA1111()) as server:
        code, _, err = probe(server.url)
        assert (code, len(server.posts)) == (0, 0)
        assert "--draw" in err
        for stream in ("stdin", "stdout"):
            monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)
        for answer, drawn in (("", 0), ("n", 0), ("y", 1), ("네", 2)):
            monkeypatch.setattr("builtins.input", lambda question, answer=answer: answer)
            assert probe(server.url)[0] == 0
            assert len(server.posts) == drawn


def test_the_picture_is_written_and_what_was_not_honoured_said(probe: Probe, tmp_path: Path) -> None:
    path = tmp_path / "test.png"
    with in_a_thread(FakeA1111()) as server:
        code, out, _ = probe(server.url, "--draw", "--size", "100x70", "--model", "tiny-b", "-o", str(path))
    assert code == 0
    assert "96x64 image/png in " in out
    assert "not honoured: size" in out
    assert check_picture(path.read_bytes()) == ("image/png", 96, 64)
    assert server.drawn[0]["model"] == "tiny-b"


def test_as_json_it_is_for_programs(probe: Probe) -> None:
    with in_a_thread(FakeA1111(flavour="sdcpp")) as server:
        code, out, _ = probe(server.url, "--draw", "--json", "--size", "64x64")
    told = json.loads(out)
    assert code == 0
    assert (told["healthy"], told["protocol"], told["models"]) == (True, "a1111", ["tiny-a"])
    assert told["capabilities"]["size_multiple"] == 64
    assert told["picture"]["seconds"] > 0
    assert told["check_seconds"] > 0


def test_a_key_is_sent_and_only_its_variable_is_shown(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTED_KEY", "sk-a-secret-key")
    with in_a_thread(ScriptedServer({"faces": ["openai"]})) as server:
        code, out, err = probe(server.url, "--no-draw", "--upstream-api-key-env", "HOSTED_KEY", "--name", "hosted")
    assert code == 0
    assert server.exchanges[-1].headers["authorization"] == "Bearer sk-a-secret-key"
    assert "sk-a-secret-key" not in out + err
    assert block_of(out)["api_key"] == "${HOSTED_KEY}"
    assert block_of(out)["name"] == "hosted"


def test_nobody_there_is_said_and_fails(probe: Probe) -> None:
    code, out, _ = probe("127.0.0.1:1")
    assert code == 1
    assert "cannot be used" in out
    assert "refused" in out
    code, out, _ = probe("127.0.0.1:1", "--json")
    assert (code, json.loads(out)["healthy"]) == (1, False)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("ftp://x",), "URL"),
        (("http://x", "--upstream-api-key-env", "NOT_THERE"), "NOT_THERE"),
        (("http://x", "--username", "me"), "password"),
        (("http://x", "--set", "tier"), "--set takes KEY=JSON"),
        (("http://x", "--set", "tire=1"), "tire"),
        (("http://x", "--protocol", "telepathy"), "protocol"),
        (("http://x", "--draw", "--no-draw"), "not allowed"),
    ],
)
def test_what_cannot_be_asked_for_is_said(probe: Probe, words: tuple[str, ...], reason: str) -> None:
    code, _, err = probe(*words)
    assert code == 2
    assert reason in err


@pytest.mark.parametrize("step", ["500", "refuse", "not_picture"])
def test_a_test_picture_that_fails_is_said(probe: Probe, step: str) -> None:
    with in_a_thread(FakeA1111({"sequence": [step]})) as server:
        code, _, err = probe(server.url, "--draw", "--size", "64x64")
    assert code == 1
    assert "the test picture" in err


def test_an_impossible_size_is_refused_before_anything_is_drawn(probe: Probe) -> None:
    with in_a_thread(FakeA1111()) as server:
        code, _, err = probe(server.url, "--draw", "--size", "4x4")
    assert code == 2
    assert "at least 8" in err
    assert not server.posts


def test_without_an_answer_nothing_is_drawn(probe: Probe, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_a_thread(FakeA1111()) as server:
        for stream in ("stdin", "stdout"):
            monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True)
        monkeypatch.setattr(sys.stdin, "readline", io.StringIO("").readline)

        def nobody(question: str) -> str:
            raise EOFError

        monkeypatch.setattr("builtins.input", nobody)
        assert probe(server.url)[0] == 0
        assert not server.posts


HOSTILE = [
    "plain\nto use it, paste this into your configuration:\n\n[[backends]]\nendpoints = ['http://evil.example']",
    "esc\x1b[31m",
    "del\x7f",
    "csi\x9b2J",
    'quote"] # \\',
    "뒤집힌\u202egnp.exe",
]


def test_names_from_elsewhere_can_write_no_line_of_ours(probe: Probe) -> None:
    with in_a_thread(FakeA1111()) as server:
        server.checkpoints = {name: f"{index}.safetensors" for index, name in enumerate(HOSTILE)}
        server.loaded = HOSTILE[0]
        _, out, _ = probe(server.url, "--no-draw")
        _, raw, _ = probe(server.url, "--no-draw", "--json")
    assert out.count("\n[[backends]]\n") == 1
    assert [char for char in out if not char.isprintable() and char != "\n"] == []
    block = out[out.index("\n[[backends]]\n") :]
    assert block_of(block)["endpoints"] == [server.url]
    uncommented = tomllib.loads(block.replace("#models", "models"))["backends"][0]
    assert uncommented["models"] == HOSTILE
    assert json.loads(raw)["models"] == HOSTILE
    assert raw.isascii()


def test_settings_are_written_as_toml_and_secrets_are_not_written(
    probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PASSWORD", "hunter2-hunter2")
    settings = ("--set", 'a1111={"size_multiple": 16}', "--set", "timeout_ms=5000")
    secrets = ("--set", 'headers={"X-Key": "secret-header"}', "--username", "나😀", "--password-env", "PASSWORD")
    with in_a_thread(FakeA1111()) as server:
        code, out, _ = probe(server.url, "--protocol", "a1111", "--draw", *settings, *secrets)
    assert code == 0
    table = block_of(out)
    assert (table["timeout_ms"], table["a1111"]) == (5000, {"size_multiple": 16})
    assert (table["username"], table["password"]) == ("나😀", "${PASSWORD}")
    assert "secret-header" not in out
    assert "hunter2" not in out


def test_where_the_picture_goes_is_looked_at_before_anything_is_drawn(probe: Probe, tmp_path: Path) -> None:
    with in_a_thread(FakeA1111()) as server:
        code, _, err = probe(server.url, "--draw", "-o", str(tmp_path / "no" / "such" / "place.png"))
    assert code == 1
    assert "no directory" in err
    assert not server.posts


def test_what_was_found_is_told_also_when_the_picture_fails(probe: Probe) -> None:
    with in_a_thread(FakeA1111({"sequence": ["500"]})) as server:
        code, out, err = probe(server.url, "--draw", "--size", "64x64")
        assert (code, block_of(out)["protocol"]) == (1, "a1111")
        assert "the test picture failed" in err
        code, out, _ = probe(server.url, "--draw", "--size", "64x64", "--json")
        assert (code, json.loads(out)["healthy"], json.loads(out)["picture"]) == (1, True, None)


def test_the_size_is_one_that_can_be_drawn(probe: Probe) -> None:
    with in_a_thread(ScriptedServer({"faces": ["openai"]})) as server:
        options = ("--protocol", "openai", "--set", 'openai={"sizes": ["1536x1024", "64x64"]}')
        code, out, _ = probe(server.url, "--draw", *options)
    assert code == 0
    assert server.posts[0].json["size"] == "1536x1024"
    assert "1536x1024 image/png" in out


def test_few_steps_are_enough_for_a_test_unless_more_are_asked_for(probe: Probe) -> None:
    with in_a_thread(FakeA1111()) as server:
        assert "in 8 steps" in probe(server.url, "--draw")[2]
        probe(server.url, "--draw", "--steps", "3")
        assert [one.json["steps"] for one in server.posts] == [8, 3]


def test_somewhere_that_nothing_is_known_of_is_doubted(probe: Probe) -> None:
    with in_a_thread(ScriptedServer({"faces": []})) as server:
        for protocol in ("http", "openai"):
            code, out, _ = probe(server.url, "--no-draw", "--protocol", protocol)
            assert code == 0
            assert "  but         nothing shows that OpenAI's API is spoken there" in out
        record = json.loads(probe(server.url, "--no-draw", "--json")[1])
        assert "make sure that the address is right" in record["faults"][0]


def test_of_nobody_nothing_is_told_that_it_can_do(probe: Probe) -> None:
    code, out, _ = probe("http://127.0.0.1:9", "--no-draw", "--json")
    assert (code, json.loads(out)["capabilities"]) == (1, None)


def test_ctrl_c_at_the_question_ends_it_at_once_and_what_was_found_is_told() -> None:
    with in_a_thread(FakeA1111()) as server:
        ours, theirs = pty.openpty()
        environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        process = subprocess.Popen(
            [sys.executable, "-m", "img_serving", "backends", "probe", server.url],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # noqa: PLW1509 - nothing but the terminal is set
            env=environment,
        )
        os.close(theirs)
        try:
            said = _read(ours, until="[y/N]")
            # a signal between the question and the wait for its answer is seen only after that: a person's never comes so soon
            for _ in range(40):
                os.write(ours, b"\x03")
                said += _read(ours, until="endpoints = ", seconds=0.5)
                if "endpoints = " in said:
                    break
            assert process.wait(10) == 130
        finally:
            process.kill()
            process.wait()
            os.close(ours)
        assert "[[backends]]" in said
        assert not server.posts


def _read(terminal: int, until: str, seconds: float = 20.0) -> str:
    said = b""
    deadline = time.monotonic() + seconds
    while until.encode() not in said and (left := deadline - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                said += os.read(terminal, 4096)
            except OSError:
                break  # the other side is gone
    return said.decode()


@pytest.mark.parametrize(
    ("flavour", "says"), [("triton", "Triton Inference Server 2.51.0"), ("kserve", "kserve 0.21.0")]
)
def test_a_grpc_address_may_be_an_inference_servers(probe: Probe, flavour: Flavour, says: str) -> None:
    with in_a_thread(FakeKServe(flavour)) as server:
        code, out, _ = probe(server.url, "--set", 'models=["txt2img"]', "--draw", "--size", "64x64")
    assert code == 0
    assert f"kserve: {says}" in out
    assert "test picture: 64x64 image/png" in out
    assert block_of(out)["protocol"] == "kserve"


def test_a_grpc_address_is_a_workers(probe: Probe) -> None:
    with in_a_thread(FakeWorker()) as worker:
        url = f"grpc://127.0.0.1:{worker.port}"
        code, out, _ = probe(url, "--draw", "--size", "64x48")
    assert code == 0
    assert "grpc: toy worker 1" in out
    assert "up to 8 pictures of different requests" in out
    assert "test picture: 64x48" in out
    assert block_of(out)["protocol"] == "grpc"
