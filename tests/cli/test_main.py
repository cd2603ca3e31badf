"""The command line as a whole: which command runs, what endings become, and what is not loaded."""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys

import pytest

from img_serving import __version__
from img_serving.cli import main, serve, version

Out = pytest.CaptureFixture[str]


@pytest.mark.parametrize("words", [["--help"], ["-h"]])
def test_help_names_every_command_and_shows_examples(words: list[str], capsys: Out) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for command in (
        "serve",
        "generate",
        "backends",
        "check-config",
        "health",
        "jobs",
        "queue",
        "webhooks",
        "simulate",
        "version",
        "--port 9000",
    ):
        assert command in out


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["generate"],
        ["backends"],
        ["backends", "list"],
        ["backends", "add"],
        ["check-config"],
        ["health"],
        ["jobs"],
        ["jobs", "list"],
        ["jobs", "show"],
        ["jobs", "follow"],
        ["jobs", "cancel"],
        ["queue"],
        ["webhooks"],
        ["webhooks", "secret"],
        ["webhooks", "list"],
        ["webhooks", "redeliver"],
        ["simulate"],
    ],
)
def test_every_command_has_help(words: list[str], capsys: Out) -> None:
    assert main([*words, "--help"]) == 0
    assert f"usage: img-serving {' '.join(words)}" in capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--port", "9000"], ["--config", "x.toml"]])
def test_without_a_command_it_serves(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(args: argparse.Namespace) -> int:
        ran.append(args)
        return 0

    monkeypatch.setattr(serve, "run", run)
    assert main(words) == 0
    assert len(ran) == 1


@pytest.mark.parametrize("words", [["serv"], ["serve", "--prot", "1"], ["backends"], ["generate"], ["version", "x"]])
def test_wrong_usage_is_exit_code_2_with_the_usage(words: list[str], capsys: Out) -> None:
    assert main(words) == 2
    assert "usage: img-serving" in capsys.readouterr().err


def test_options_are_never_abbreviated(capsys: Out) -> None:
    assert main(["serve", "--conf", "x"]) == 2
    assert "--conf" in capsys.readouterr().err


def test_ctrl_c_is_130_without_a_word(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(version, "run", interrupted)
    assert main(["version"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_left_is_no_traceback() -> None:
    script = "import sys; from img_serving.cli import main; sys.exit(main(['check-config', '--defaults']))"
    read, write = os.pipe()
    os.close(read)
    try:
        ended = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(write)
    assert ended.returncode == 1
    assert ended.stderr == b""


def test_help_and_version_load_only_the_standard_library() -> None:
    script = (
        "import sys; from img_serving.cli import main; main(['--help']); main(['version'])\n"
        "print([one for one in ('msgspec', 'rich', 'numpy', 'uvicorn', 'http.client', 'img_serving.main')"
        " if one in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


def test_serve_loads_no_rich_and_no_numpy_before_it_serves() -> None:
    script = (
        "import sys; from img_serving import main as root; from img_serving.cli import main\n"
        "root.run = lambda start: print([one for one in ('rich', 'numpy', 'PIL') if one in sys.modules])\n"
        "sys.exit(main(['serve']))"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout.strip()) == (0, "[]"), ended.stderr


def test_python_m_is_the_same_program() -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "img_serving", "--version"], capture_output=True, text=True, check=True
    )
    assert ended.stdout == f"img-serving {__version__}\n"


def test_text_that_the_terminal_cannot_show_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = io.BytesIO()
    with io.TextIOWrapper(shown, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--help"]) == 0
        assert b"img-serving" in shown.getvalue()
        monkeypatch.undo()
