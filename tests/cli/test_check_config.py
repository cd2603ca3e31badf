"""`check-config`: what it says of a configuration that works, and of one that does not."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from img_serving.cli import main
from img_serving.config import Config, load

Out = pytest.CaptureFixture[str]

GOOD = """
[server]
port = 9000
[auth]
api_keys = [{name = "a", key = "sk-very-secret", role = "admin"}, {name = "b", key = "sk-hidden"}]
[storage]
signed_urls = true
[[backends]]
name = "sd"
protocol = "a1111"
endpoints = ["http://gpu-1:7860", {url = "http://gpu-2:7860", weight = 2}]
password = "pass-word"
username = "me"
[[backends]]
name = "hosted"
protocol = "openai"
endpoints = ["https://api.example.com/v1"]
api_key = "upstream-secret"
headers = {X-Team = "header-secret"}
models = ["모델"]
enabled = false
"""
SECRETS = ("sk-very-secret", "sk-hidden", "pass-word", "upstream-secret", "header-secret")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.toml"
    path.write_text(GOOD)
    return path


def test_a_good_file_is_ok_with_a_summary_and_its_notes(good: Path, capsys: Out) -> None:
    assert main(["check-config", "--config", "good.toml"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"OK: {good}\n")
    assert "http://0.0.0.0:9000" in out
    assert "2 (1 admin, 1 user)" in out
    assert "sd (a1111, 2 endpoints)" in out
    assert "hosted (openai, 1 endpoint, disabled)" in out
    assert "note: storage.signed_urls" in out
    assert not any(secret in out for secret in SECRETS)


def test_the_defaults_are_ok_without_a_file(capsys: Out) -> None:
    assert main(["check-config"]) == 0
    out = capsys.readouterr().out
    assert "no file" in out
    assert "built-in" in out


def test_authentication_that_is_off_is_said(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("IMG_SERVING__AUTH__ENABLED", "false")
    assert main(["check-config"]) == 0
    assert "authentication is off" in capsys.readouterr().out


def test_every_problem_is_listed_with_exit_code_2(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "bad.toml").write_text('[server]\nprot = 1\n[[backends]]\nname = "x y"\nendpoints = ["nope"]\n')
    assert main(["check-config", "--config", "bad.toml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    for path in ("server.prot", "backends[0].name", "backends[0].endpoints"):
        assert path in captured.err


def test_a_ca_file_that_is_not_there_is_found_before_the_start(tmp_path: Path, capsys: Out) -> None:
    (tmp_path / "bad.toml").write_text(
        '[[backends]]\nname = "x"\nprotocol = "openai"\nendpoints = ["https://a"]\nca_file = "no.pem"\n'
    )
    assert main(["check-config", "--config", "bad.toml"]) == 2
    assert "backends[0] (x): no.pem: No such file" in capsys.readouterr().err


def test_show_masks_every_secret_and_shows_the_rest_as_toml(good: Path, capsys: Out) -> None:
    assert main(["check-config", "--config", "good.toml", "--show"]) == 0
    out = capsys.readouterr().out
    assert not any(secret in out for secret in SECRETS)
    shown = tomllib.loads(out)
    assert shown["server"]["port"] == 9000
    assert shown["auth"]["api_keys"][0] == {
        "name": "a",
        "key": "***",
        "role": "admin",
        "priority": 0,
        "weight": 1,
    }
    assert shown["backends"][0]["endpoints"] == ["http://gpu-1:7860", {"url": "http://gpu-2:7860", "weight": 2}]
    assert shown["backends"][1]["headers"] == {"X-Team": "***"}
    assert shown["backends"][1]["models"] == ["모델"]


def test_show_masks_plain_keys_too(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setenv("IMG_SERVING__AUTH__API_KEYS", "sk-very-secret,sk-hidden")
    assert main(["check-config", "--show"]) == 0
    out = capsys.readouterr().out
    assert tomllib.loads(out)["auth"]["api_keys"] == ["***", "***"]
    assert not any(secret in out for secret in SECRETS)


def test_show_without_secrets_can_be_loaded_again(tmp_path: Path, capsys: Out) -> None:
    assert main(["check-config", "--show"]) == 0
    (tmp_path / "shown.toml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "shown.toml", {}).config == Config()


def test_defaults_are_a_file_that_loads_to_the_defaults(tmp_path: Path, capsys: Out) -> None:
    assert main(["check-config", "--defaults"]) == 0
    (tmp_path / "new.toml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "new.toml", {}).config == Config()
