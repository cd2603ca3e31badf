"""`serve`: what reaches the composition root, and how a start that is impossible is told."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from img_serving import main as root
from img_serving.cli import main
from img_serving.config import Config
from img_serving.domain.errors import StartError
from img_serving.state.sqlite import StateError
from img_serving.transport import allocator

Out = pytest.CaptureFixture[str]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What `main.serve` was called with; nothing is started."""
    seen = SimpleNamespace(config=None, more={}, tuned=False)

    def record(config: Config, **more: Any) -> None:
        seen.config, seen.more = config, more

    monkeypatch.setattr(root, "serve", record)
    monkeypatch.setattr(root, "run", lambda start: start())
    monkeypatch.setattr(allocator, "tune_allocator", lambda: setattr(seen, "tuned", True))
    return seen


def fail_with(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(start: object) -> None:
        raise error

    monkeypatch.setattr(root, "run", run)


def test_the_defaults_are_served_where_there_is_no_file(served: SimpleNamespace) -> None:
    assert main(["serve"]) == 0
    assert served.config == Config()
    assert served.more["source"] is None
    assert served.more["env_file"] is None
    assert served.tuned


def test_host_and_port_lie_over_everything(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG_SERVING__SERVER__PORT", "1111")
    assert main(["serve", "--host", "127.0.0.1", "--port", "9000"]) == 0
    assert (served.config.server.host, served.config.server.port) == ("127.0.0.1", 9000)


def test_the_environment_stands_where_no_option_does(served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMG_SERVING__SERVER__PORT", "1111")
    assert main([]) == 0
    assert served.config.server.port == 1111


def test_the_file_its_notes_and_the_env_file_are_handed_on(
    served: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "default.toml").write_text("[storage]\nsigned_urls = true\n")
    monkeypatch.setenv("IMG_SERVING_ENV_FILE", ".env")
    assert main(["--port", "0"]) == 0
    assert served.more["source"] == tmp_path / "config" / "default.toml"
    assert served.more["env_file"] == Path(".env")
    assert any("signed_urls" in note for note in served.more["notes"])


def test_announcements_are_shown_at_once_and_survive_a_reader_that_left(
    served: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(["serve"])
    flushed = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=lambda text: None, flush=lambda: flushed.append(1)))
    served.more["announce"]("hello")
    assert flushed

    def gone(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=gone, flush=lambda: None))
    served.more["announce"]("hello")


@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_a_port_that_is_none_is_wrong_usage(port: str, capsys: Out) -> None:
    assert main(["serve", f"--port={port}"]) == 2
    assert "--port" in capsys.readouterr().err


def test_a_wrong_configuration_is_exit_code_2_with_everything_that_is_wrong(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "bad.toml").write_text('[server]\nprot = 1\n[queue]\nmax_tasks = "many"\n')
    assert main(["serve", "--config", "bad.toml"]) == 2
    err = capsys.readouterr().err
    assert "server.prot" in err
    assert "queue.max_tasks" in err
    assert "Traceback" not in err


def test_a_file_that_is_not_there_is_exit_code_2(capsys: Out) -> None:
    assert main(["serve", "--config", "nowhere.toml"]) == 2
    assert 'there is no file "nowhere.toml"' in capsys.readouterr().err


@pytest.mark.parametrize("error", [StartError("the port is taken"), StateError("the state file is damaged")])
def test_a_start_that_is_impossible_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    fail_with(error, monkeypatch)
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == f"error: {error}\n"


def test_an_option_that_only_its_adapter_knows_to_be_wrong_is_a_configuration_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    (tmp_path / "bad.toml").write_text('[[backends]]\nname = "s"\nprotocol = "scripted"\nscripted = {nope = 1}\n')
    fail_with(ValueError("nope"), monkeypatch)
    assert main(["serve", "--config", "bad.toml"]) == 2
    assert "backends[0] (s): nope" in capsys.readouterr().err


def test_an_unexpected_error_stays_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(ValueError("a bug"), monkeypatch)
    with pytest.raises(ValueError, match="a bug"):
        main(["serve"])


def test_the_handler_of_sigterm_is_put_back(served: SimpleNamespace) -> None:
    before = signal.getsignal(signal.SIGTERM)
    main(["serve"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.smoke
def test_the_real_program_listens_announces_its_key_and_ends_with_0_on_sigterm(tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "img_serving", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        try:
            lines = [program.stdout.readline() for _ in range(3)]
            port = int(lines[2].split("://127.0.0.1:")[1].split()[0])
            with socket.create_connection(("127.0.0.1", port), timeout=5):
                pass
            program.send_signal(signal.SIGTERM)
            assert program.wait(10) == 0
        finally:
            program.kill()
    assert "sk-" in lines[0]
