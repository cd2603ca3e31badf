"""`generate`: what is asked for, where pictures go, and that no file is ever left half written."""

from __future__ import annotations

import base64
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from img_serving.cli import main
from img_serving.cli.pictures import slug
from img_serving.media.sniff import check_picture

if TYPE_CHECKING:
    from tests.cli.conftest import StubGateway

Out = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def files(directory: Path) -> list[str]:
    return sorted(one.name for one in directory.iterdir())


def test_one_call_asks_for_what_was_said_and_no_more(gateway: StubGateway) -> None:
    gateway.answer_pictures()
    assert main(["generate", "a fox", "-o", "fox.png"]) == 0
    assert main(["generate", "a fox", "-o", "fox"]) == 0
    assert (gateway.asked[0].method, gateway.asked[0].path) == ("POST", "/v1/images/generations")
    assert gateway.asked[0].body == {"prompt": "a fox", "n": 1, "response_format": "b64_json", "output_format": "png"}
    assert gateway.asked[1].body == {"prompt": "a fox", "n": 1, "response_format": "b64_json"}


def test_every_option_reaches_the_gateway(gateway: StubGateway) -> None:
    gateway.answer_pictures()
    words = "-n 2 --size 64x32 --steps 5 --seed 7 --guidance 2.5 --negative blurry --model m --backend b --format webp"
    assert main(["generate", "여우", "-o", "x.jpg", *words.split(), "--compression", "80"]) == 0
    assert gateway.asked[0].body == {
        "prompt": "여우",
        "n": 2,
        "response_format": "b64_json",
        "size": "64x32",
        "num_inference_steps": 5,
        "seed": 7,
        "guidance_scale": 2.5,
        "negative_prompt": "blurry",
        "model": "m",
        "backend": "b",
        "output_format": "webp",
        "output_compression": 80,
    }


def test_a_picture_is_written_and_told(
    gateway: StubGateway, tmp_path: Path, make_png: Callable[..., bytes], capsys: Out
) -> None:
    gateway.answer_pictures(seed=42)
    assert main(["generate", "a fox", "-o", "fox.png"]) == 0
    assert (tmp_path / "fox.png").read_bytes() == make_png(8, 6, 0)
    assert files(tmp_path) == ["fox.png"]
    captured = capsys.readouterr()
    assert captured.out.startswith("fox.png  8x6  ")
    assert "seed 42  sd  0.0" in captured.out
    assert captured.err == ""


def test_several_pictures_are_numbered(gateway: StubGateway, tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    gateway.answer_pictures(3)
    assert main(["generate", "x", "-n", "3", "-o", "out.png"]) == 0
    assert files(tmp_path) == ["out-1.png", "out-2.png", "out-3.png"]
    assert (tmp_path / "out-3.png").read_bytes() == make_png(8, 6, 2)


def test_the_number_goes_where_the_name_says(gateway: StubGateway, tmp_path: Path) -> None:
    gateway.answer_pictures(2)
    assert main(["generate", "x", "-n", "2", "-o", "a{i}b.png"]) == 0
    assert files(tmp_path) == ["a1b.png", "a2b.png"]


def test_without_a_name_the_prompt_and_the_seed_give_one(gateway: StubGateway, tmp_path: Path) -> None:
    gateway.answer_pictures(2, seed=5)
    assert main(["generate", "눈 내리는  한옥, A Village!", "-n", "2"]) == 0
    assert files(tmp_path) == ["눈-내리는-한옥-a-village-5.png", "눈-내리는-한옥-a-village-6.png"]


def test_without_a_seed_the_place_stands_in_the_name(gateway: StubGateway, tmp_path: Path, capsys: Out) -> None:
    gateway.answer_pictures(seed=None)
    assert main(["generate", "fox"]) == 0
    assert files(tmp_path) == ["fox-1.png"]
    assert "no seed" in capsys.readouterr().out


def test_a_directory_gets_names_of_ours(gateway: StubGateway, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    gateway.answer_pictures()
    assert main(["generate", "fox", "-o", "there"]) == 0
    assert files(tmp_path / "there") == ["fox-42.png"]


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("../../etc/passwd", "etc-passwd"),
        ("!!!", "picture"),
        ("a" * 300, "a" * 50),
        ("\u1112\u1161\u11ab", "한"),
        ("snake_case -x", "snake-case-x"),
    ],
)
def test_a_name_from_a_prompt_is_always_a_plain_one(prompt: str, name: str) -> None:
    assert slug(prompt) == name


def test_an_existing_file_is_replaced(gateway: StubGateway, tmp_path: Path, make_png: Callable[..., bytes]) -> None:
    (tmp_path / "fox.png").write_text("old")
    gateway.answer_pictures()
    assert main(["generate", "x", "-o", "fox.png"]) == 0
    assert (tmp_path / "fox.png").read_bytes() == make_png(8, 6, 0)


def test_what_a_link_points_to_is_replaced_and_not_the_link(gateway: StubGateway, tmp_path: Path) -> None:
    (tmp_path / "real.png").write_text("old")
    (tmp_path / "link.png").symlink_to("real.png")
    gateway.answer_pictures()
    assert main(["generate", "x", "-o", "link.png"]) == 0
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "real.png").read_bytes().startswith(b"\x89PNG")


def test_a_device_is_written_to_and_never_replaced(gateway: StubGateway) -> None:
    gateway.answer_pictures()
    assert main(["generate", "x", "-o", os.devnull]) == 0
    assert Path(os.devnull).is_char_device()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    gateway: StubGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    (tmp_path / "fox.png").write_text("old")
    gateway.answer_pictures()

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert main(["generate", "x", "-o", "fox.png"]) == 1
    assert capsys.readouterr().err == "error: fox.png cannot be written: No space left on device\n"
    assert files(tmp_path) == ["fox.png"]
    assert (tmp_path / "fox.png").read_text() == "old"


def test_ctrl_c_while_writing_leaves_nothing(
    gateway: StubGateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.answer_pictures()

    def interrupted(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", interrupted)
    assert main(["generate", "x", "-o", "fox.png"]) == 130
    assert files(tmp_path) == []


def test_a_picture_that_is_cut_short_is_not_written(
    gateway: StubGateway, tmp_path: Path, make_png: Callable[..., bytes], capsys: Out
) -> None:
    cut = base64.b64encode(make_png(8, 6)[:-20]).decode()
    gateway.answer(200, {"created": 1, "data": [{"b64_json": cut}]})
    assert main(["generate", "x", "-o", "fox.png"]) == 1
    assert "cut short" in capsys.readouterr().err
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    "body", [{"created": 1, "data": []}, {"data": [{"url": "http://x"}]}, b"<html>", {"data": [{"b64_json": "!"}]}]
)
def test_an_answer_without_pictures_is_told(body: Any, gateway: StubGateway, tmp_path: Path, capsys: Out) -> None:
    gateway.answer(200, body)
    assert main(["generate", "x", "-o", "fox.png"]) == 1
    assert "holds no pictures" in capsys.readouterr().err
    assert files(tmp_path) == []


def test_a_directory_that_is_not_there_is_told_before_anything_is_drawn(gateway: StubGateway, capsys: Out) -> None:
    assert main(["generate", "x", "-o", "nowhere/fox.png"]) == 1
    assert "there is no directory nowhere" in capsys.readouterr().err
    assert gateway.asked == []


def test_a_directory_that_cannot_be_written_is_told_before_anything_is_drawn(
    gateway: StubGateway, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["generate", "x", "-o", "fox.png"]) == 1
    assert "cannot be written to" in capsys.readouterr().err
    assert gateway.asked == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["generate", ""], "empty"),
        (["generate", "\udcff"], "not valid text"),
        (["generate", "x", "-n", "0"], "1 or more"),
        (["generate", "x", "-n", "two"], "not a whole number"),
        (["generate", "x", "--size", "9x"], "WIDTHxHEIGHT"),
        (["generate", "x", "--seed", "-1"], "from 0"),
        (["generate", "x", "--guidance", "nan"], "0 or more"),
        (["generate", "x", "--format", "gif"], "invalid choice"),
        (["generate", "x", "--compression", "101"], "from 0 to 100"),
        (["generate", "x", "-o", "-", "-n", "2"], "one picture"),
        (["generate", "x", "-o", "-", "--json"], "both the picture and the JSON"),
        (["generate", "x", "--quiet", "--json"], "not allowed with"),
        (["generate", "x", "--config", "a.toml"], "--local"),
        (["generate", "x", "--local", "--url", "http://a"], "--local calls no gateway"),
    ],
)
def test_what_cannot_be_meant_is_wrong_usage(words: list[str], told: str, capsys: Out) -> None:
    assert main(words) == 2
    assert told in capsys.readouterr().err


def test_standard_output_takes_the_picture_and_standard_error_the_rest(
    gateway: StubGateway, make_png: Callable[..., bytes], capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    gateway.answer_pictures()
    assert main(["generate", "x", "-o", "-"]) == 0
    captured = capfdbinary.readouterr()
    assert captured.out == make_png(8, 6, 0)
    assert b"seed 42" in captured.err


def test_a_terminal_is_not_shown_a_picture(monkeypatch: pytest.MonkeyPatch, capsys: Out) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert main(["generate", "x", "-o", "-"]) == 2
    assert "no text for a terminal" in capsys.readouterr().err


def test_quiet_says_nothing(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer_pictures()
    assert main(["generate", "x", "-o", "x.png", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


def test_json_says_everything(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer_pictures(2, x_job_id="job_1", x_img_serving_ignored="seed, style")
    assert main(["generate", "x", "-n", "2", "-o", "x.png", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {key: told[key] for key in ("backend", "job_id", "request_id", "ignored")} == {
        "backend": "sd",
        "job_id": "job_1",
        "request_id": "req_1",
        "ignored": ["seed", "style"],
    }
    assert [one["path"] for one in told["images"]] == ["x-1.png", "x-2.png"]
    assert told["images"][1]["seed"] == 43
    assert (told["images"][0]["width"], told["images"][0]["height"]) == (8, 6)


def test_what_the_backend_could_not_honour_is_noted(gateway: StubGateway, capsys: Out) -> None:
    gateway.answer_pictures(x_img_serving_ignored="negative_prompt")
    assert main(["generate", "x", "-o", "x.png", "--negative", "y"]) == 0
    assert capsys.readouterr().err == "note: sd cannot honour negative_prompt\n"


def test_a_refusal_writes_nothing(gateway: StubGateway, tmp_path: Path, capsys: Out) -> None:
    gateway.refuse(400, "n is 11; at most 10 are allowed", x_request_id="req_7")
    assert main(["generate", "x", "-n", "11"]) == 1
    assert capsys.readouterr().err == "error: n is 11; at most 10 are allowed (400, request req_7)\n"
    assert files(tmp_path) == []


def test_a_terminal_sees_progress_and_a_pipe_does_not(
    gateway: StubGateway, monkeypatch: pytest.MonkeyPatch, capsys: Out
) -> None:
    gateway.answer_pictures(2)
    assert main(["generate", "x", "-n", "2", "-o", "x.png"]) == 0
    assert capsys.readouterr().err == ""
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["generate", "x", "-n", "2", "-o", "x.png"]) == 0
    assert "drawing 2 pictures" in terminal.getvalue()


# without a gateway


def test_local_draws_in_this_process_and_leaves_nothing_else(tmp_path: Path, capsys: Out) -> None:
    assert main(["generate", "a fox", "--local", "--size", "64x48", "--seed", "5", "-n", "2", "-o", "fox.webp"]) == 0
    assert files(tmp_path) == ["fox-1.webp", "fox-2.webp"]
    assert check_picture((tmp_path / "fox-1.webp").read_bytes()) == ("image/webp", 64, 48)
    captured = capsys.readouterr()
    assert "seed 5  procedural" in captured.out
    assert captured.err == ""


def test_local_gives_the_same_picture_for_the_same_seed(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert main(["generate", "a fox", "--local", "--size", "32x32", "--seed", "5", "-o", name]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_local_shows_how_far_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[[backends]]\nname = "s"\nprotocol = "scripted"\nscripted = {latency_seconds = 0.4, steps = 4}\n'
    )
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    assert main(["generate", "x", "--local", "--config", "s.toml", "--size", "16x16", "-o", "x.png"]) == 0
    shown = terminal.getvalue()
    assert "drawing" in shown
    assert any(f"{share}%" in shown for share in (25, 50, 75))


def test_local_reads_no_file_that_was_not_named(tmp_path: Path) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "default.toml").write_text("this is not TOML")
    assert main(["generate", "x", "--local", "--size", "16x16", "-o", "x.png", "--quiet"]) == 0


def test_local_refusals_are_messages(tmp_path: Path, capsys: Out) -> None:
    assert main(["generate", "x", "--local", "-n", "11"]) == 1
    assert capsys.readouterr().err == "error: n is 11; at most 10 are allowed\n"
    (tmp_path / "s.toml").write_text(
        '[retry]\nmax_attempts = 1\n[[backends]]\nname = "s"\nprotocol = "scripted"\nscripted = {fail_rate = 1.0}\n'
    )
    assert main(["generate", "x", "--local", "--config", "s.toml"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    (tmp_path / "s.toml").write_text('[[backends]]\nname = "s"\nprotocol = "scripted"\nscripted = {nope = 1}\n')
    assert main(["generate", "x", "--local", "--config", "s.toml"]) == 2
    assert "backends[0] (s): nope" in capsys.readouterr().err
