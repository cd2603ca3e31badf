"""`backends`: the table, what is sent, and how refusals are told."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from rich.cells import cell_len
from rich.console import Console

from img_serving.api.backends import BackendList
from img_serving.cli import main
from img_serving.cli.backends import page_of

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]


def endpoint(**more: Any) -> dict[str, Any]:
    record = {
        "url": "http://[::1]:7860",
        "usable": True,
        "health": "up",
        "health_detail": "fine",
        "breaker": "closed",
        "max_concurrency": 2,
        "in_flight": 1,
        "weight": 1.0,
        "calls": 3,
        "failures": 0,
        "latency_seconds": 0.5,
        "last_error": None,
    }
    return {**record, **more}


def backend(name: str, **more: Any) -> dict[str, Any]:
    record = {
        "object": "backend",
        "name": name,
        "protocol": "http",
        "detected_protocol": None,
        "endpoints": [endpoint()],
        "healthy": True,
        "enabled": True,
        "weight": 1.0,
        "tier": 0,
        "models": ["sdxl"],
        "origin": "api",
    }
    return {**record, **more}


def listing(*backends: dict[str, Any]) -> dict[str, Any]:
    return {"object": "list", "data": list(backends)}


def test_list_shows_what_is_there_and_how_it_is(gateway: StubGateway, capsys: Out) -> None:
    down = endpoint(url="http://b:1", usable=False, health="down", health_detail="refused", breaker="half_open")
    gateway.answer(
        200,
        listing(
            backend("sd", detected_protocol="a1111", endpoints=[endpoint(), down], weight=2.5),
            backend("broken", healthy=False),
            backend("off", enabled=False, models=[]),
        ),
    )
    assert main(["backends", "list"]) == 0
    out = capsys.readouterr().out
    for text in ("sd", "http (a1111)"):
        assert text in out
    rows = [line.rstrip().split(maxsplit=2) for line in out.splitlines() if "http://" in line]
    assert ["sd", "http://[::1]:7860", "up"] in rows
    assert ["sd", "http://b:1", "down, breaker half open (refused)"] in rows
    for text in ("healthy", "unhealthy", "disabled", "sdxl", "2.5", "2/4"):
        assert text in out
    assert gateway.asked[0].path == "/v1/backends"


def test_columns_stay_aligned_with_korean_text(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listing(backend("a", models=["한국어-모델-하나"]), backend("b", models=["sdxl"])))
    assert main(["backends", "list"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "1/2" in line]
    assert len(rows) == 2
    assert len({cell_len(row) for row in rows}) == 1
    assert len({len(row) for row in rows}) == 2


def test_a_terminal_of_80_columns_is_wide_enough() -> None:
    found = "stable-diffusion.cpp (GET /sdcpp/v1/capabilities answers)"
    records = listing(
        backend(
            "stable-diffusion",
            detected_protocol="comfyui",
            endpoints=[endpoint(url="http://127.0.0.1:8188", found=found)],
        )
    )
    console = Console(width=80, file=io.StringIO(), highlight=False)
    console.print(page_of(msgspec.convert(records, BackendList).data))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    for words in (["NAME", "PROTOCOL", "STATE", "WEIGHT", "IN FLIGHT", "MODELS"], ["http (comfyui)", "healthy", "1/2"]):
        assert any(all(word in line for word in words) for line in lines)
    assert any("http://127.0.0.1:8188" in line and "up (stable-diffusion.cpp)" in line for line in lines)


def test_a_long_row_is_not_cut_in_a_pipe(gateway: StubGateway, capsys: Out) -> None:
    models = [f"model-number-{index}" for index in range(60)]
    gateway.answer(200, listing(backend("a", models=models)))
    assert main(["backends", "list"]) == 0
    assert ", ".join(models) in capsys.readouterr().out


def test_text_from_elsewhere_cannot_command_the_terminal(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listing(backend("a", models=["\x1b[31mred[bold]"])))
    assert main(["backends", "list"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "[bold]" in out


def test_list_as_json_is_what_the_gateway_said(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, listing(backend("a", models=["모델"])))
    assert main(["backends", "list", "--json"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == listing(backend("a", models=["모델"]))
    assert "모델" in out


def test_add_sends_what_was_said_and_no_more(
    gateway: StubGateway, capsys: Out, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTED_KEY", "upstream-secret")
    gateway.answer(201, backend("sd", protocol="a1111"))
    words = "backends add sd --protocol a1111 --endpoint http://a:1 --endpoint http://b:2 --model m --weight 2"
    words += (
        " --timeout-ms 5000 --max-concurrency 3 --upstream-api-key-env HOSTED_KEY --set tier=1 --set default_size=64x64"
    )
    assert main([*words.split(), "--set", 'headers={"X": "y"}']) == 0
    asked = gateway.asked[0]
    assert (asked.method, asked.path) == ("POST", "/v1/backends")
    assert asked.body == {
        "name": "sd",
        "protocol": "a1111",
        "endpoints": ["http://a:1", "http://b:2"],
        "models": ["m"],
        "weight": 2.0,
        "timeout_ms": 5000,
        "max_concurrency": 3,
        "api_key": "upstream-secret",
        "tier": 1,
        "default_size": "64x64",
        "headers": {"X": "y"},
    }
    captured = capsys.readouterr()
    assert "added sd (a1111, 1 endpoint)" in captured.out
    assert "upstream-secret" not in captured.out + captured.err


def test_add_leaves_the_rest_to_the_gateway(gateway: StubGateway) -> None:
    gateway.answer(201, backend("sd"))
    assert main(["backends", "add", "sd", "--endpoint", "http://a:1"]) == 0
    assert gateway.asked[0].body == {"name": "sd", "endpoints": ["http://a:1"]}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--set", "tier"], "KEY=JSON"),
        (["--set", "headers={oops"], "not JSON"),
        (["--weight", "2", "--set", "weight=3"], "weight is given twice"),
        (["--upstream-api-key-env", "NOT_THERE"], "NOT_THERE is not set"),
        (["--weight", "heavy"], "--weight"),
        (["--max-concurrency", "0"], "1 or more"),
    ],
)
def test_add_refuses_what_cannot_be_meant(words: list[str], told: str, gateway: StubGateway, capsys: Out) -> None:
    assert main(["backends", "add", "sd", *words]) == 2
    assert told in capsys.readouterr().err
    assert gateway.asked == []


def test_remove_names_it_in_the_path(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, {"object": "backend", "name": "a/b", "deleted": True})
    assert main(["backends", "remove", "a/b"]) == 0
    assert (gateway.asked[0].method, gateway.asked[0].path) == ("DELETE", "/v1/backends/a%2Fb")
    assert capsys.readouterr().out == "removed a/b\n"


def test_a_refusal_is_its_message_with_the_request_id(gateway: StubGateway, capsys: Out) -> None:
    gateway.refuse(409, "'sd' is defined in config/default.toml", x_request_id="req_9")
    assert main(["backends", "remove", "sd"]) == 1
    assert capsys.readouterr().err == "error: 'sd' is defined in config/default.toml (409, request req_9)\n"


def test_an_answer_of_something_else_is_told(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer(200, b"<html>hello</html>")
    assert main(["backends", "list"]) == 1
    assert main(["backends", "list", "--json"]) == 1
    assert capsys.readouterr().err.count("is there an img-serving gateway?") == 2


def test_the_key_comes_from_the_option_the_environment_or_the_env_file(
    gateway: StubGateway, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gateway.answer(200, listing())
    main(["backends", "list"])
    (tmp_path / ".env").write_text("OTHER=1\nIMG_SERVING_API_KEY=sk-file\n")
    main(["backends", "list"])
    monkeypatch.setenv("IMG_SERVING_API_KEY", "sk-environment")
    main(["backends", "list"])
    main(["backends", "list", "--api-key", "sk-option"])
    sent = [asked.headers.get("authorization") for asked in gateway.asked]
    assert sent == [None, "Bearer sk-file", "Bearer sk-environment", "Bearer sk-option"]
