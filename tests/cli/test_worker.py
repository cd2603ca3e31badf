"""`img-serving worker`: what it refuses before anything is loaded, and what `--try` shows."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from img_serving.cli import _parser, main
from img_serving.cli.worker import _engine
from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions

ENGINE = """
from img_serving.domain.capabilities import Capabilities
from img_serving.domain.images import ItemFailure

class Toy:
    def load(self):
        pass
    def capabilities(self):
        return Capabilities(default_size=(64, 32), max_steps=20)
    def generate(self, batch, on_step):
        import numpy as np
        prompt = batch.items[0].prompt
        if prompt == "refuse":
            raise ValueError("not that one")
        if prompt == "fail":
            return [ItemFailure("this one failed")]
        if prompt == "crash":
            raise RuntimeError("boom in the engine")
        side = 16 if prompt == "small" else batch.width
        return [np.zeros((batch.height, side, 3), np.uint8)]

class Odd(Toy):
    def capabilities(self):
        return Capabilities(honours=frozenset({"steps"}))
"""

Out = pytest.CaptureFixture[str]


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMG_SERVING_WORKER_TOKEN", raising=False)
    (tmp_path / "toy.py").write_text(ENGINE)
    return "toy.py:Toy"


def test_a_picture_is_tried_without_a_gateway(engine: str, capsys: Out) -> None:
    assert main(["worker", "--engine", engine, "--try", "a fox", "--seed", "7", "-o", "fox.png"]) == 0
    assert capsys.readouterr().out == "fox.png: 64x32, image/png, seed 7\n"
    assert Path("fox.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("prompt", "words"),
    [("refuse", "refused: not that one"), ("fail", "failed: this one failed"), ("crash", "the engine failed")],
)
def test_what_goes_wrong_is_told(engine: str, capsys: Out, prompt: str, words: str) -> None:
    assert main(["worker", "--engine", engine, "--try", prompt]) == 1
    said = capsys.readouterr().err
    assert words in said
    assert ("boom in the engine" in said) is (prompt == "crash"), "a crash shows where it was"
    assert ("toy.py" in said) is (prompt == "crash")


def test_a_picture_of_another_size_than_asked_for_is_pointed_out(engine: str, capsys: Out) -> None:
    assert main(["worker", "--engine", engine, "--try", "small"]) == 0
    assert "16x32" in (said := capsys.readouterr().out)
    assert "64x32 WAS ASKED FOR" in said


def test_a_request_is_checked_as_a_worker_checks_it(engine: str, capsys: Out) -> None:
    assert main(["worker", "--engine", engine, "--try", "a fox", "--steps", "21"]) == 1
    assert "steps are from 1 to 20" in capsys.readouterr().err
    assert main(["worker", "--engine", "toy.py:Odd", "--try", "a fox"]) == 1
    assert "did you mean 'num_inference_steps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--model", "x"), "--model is not for the procedural engine"),
        (("--offline",), "offline: only for --engine diffusers"),
        (("--engine", "diffusers"), "needs --model"),
        (("--engine", "diffusers", "--model", "x", "--buckets", "4,2"), "buckets: ascending batch sizes"),
        (("--tls-cert", "x.pem"), "--tls-cert and --tls-key go together"),
        (("--slots", "0"), "must be from 1 to 64"),
        (("--model-name", "a\nb"), "--model-name: at most 256 printable characters"),
        (("--model-name", "x" * 257), "--model-name: at most 256 printable characters"),
        (("--buckets", "a"), "no list of batch sizes"),
    ],
)
def test_options_that_do_not_fit_are_refused_at_once(
    engine: str, capsys: Out, options: tuple[str, ...], words: str
) -> None:
    assert engine
    assert main(["worker", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_token_that_cannot_travel_is_refused(engine: str, capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in ("", "two words", "é"):
        monkeypatch.setenv("IMG_SERVING_WORKER_TOKEN", token)
        assert main(["worker", "--engine", engine]) == 2
        said = capsys.readouterr().err
        assert "IMG_SERVING_WORKER_TOKEN" in said
        assert not token or token not in said


def test_the_help_fits_a_terminal(capsys: Out, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["worker", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"--lora-dir DIR", "\n".join(lines))


FLAGS: dict[str, tuple[list[str], Any]] = {
    "device": (["--device", "cuda:1"], "cuda:1"),
    "dtype": (["--dtype", "bfloat16"], "bfloat16"),
    "offline": (["--offline"], True),
    "revision": (["--revision", "main"], "main"),
    "variant": (["--variant", "fp16"], "fp16"),
    "config": (["--config", "folder"], "folder"),
    "lora_dir": (["--lora-dir", "loras"], Path("loras")),
    "max_loras": (["--max-loras", "3"], 3),
    "buckets": (["--buckets", "2,4"], (2, 4)),
    "padding": (["--no-padding"], False),
    "allow_pickle": (["--allow-pickle"], True),
    "safety_checker": (["--safety-checker"], True),
    "vae_slicing": (["--no-vae-slicing"], False),
    "vae_tiling": (["--vae-tiling"], True),
    "cpu_offload": (["--cpu-offload", "model"], "model"),
    "max_pixels": (["--max-pixels", "1048576"], 1048576),
    "max_steps": (["--max-steps", "60"], 60),
    "default_steps": (["--default-steps", "4"], 4),
    "default_guidance_scale": (["--default-guidance-scale", "0"], 0.0),
    "true_cfg_scale": (["--true-cfg-scale", "4"], 4.0),
    "max_batch_size": (["--max-batch-size", "2"], 2),
    "model": ([], "folder"),
}


@pytest.mark.parametrize("field", sorted(one.name for one in fields(DiffusersOptions)))
def test_every_option_of_the_diffusers_engine_has_a_flag_that_sets_it(field: str) -> None:
    flags, value = FLAGS[field]
    args = _parser().parse_args(["worker", "--engine", "diffusers", "--model", "folder", *flags])
    engine = _engine(args)()
    assert isinstance(engine, DiffusersEngine)
    assert getattr(engine.options, field) == value
    assert engine.options == replace(DiffusersOptions(model="folder"), **{field: value}), "and nothing else"
