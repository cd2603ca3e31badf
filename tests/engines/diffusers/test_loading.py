"""Loading: what is told meanwhile, what may be read, and what is said of everything else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.support.drawing import draw, engine_of, item, pipe_of

from img_serving.domain.errors import StartError
from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions
from img_serving.engines.engine import load_fully

pytest.importorskip("torch", reason="NO TORCH: make test-diffusers runs this in an environment that has it")
pytest.importorskip("diffusers", reason="NO DIFFUSERS: make test-diffusers runs this in an environment that has it")

Models = Callable[..., Path]
ROOT = Path(__file__).parents[3]


def why_not(model: Any, **options: Any) -> str:
    with pytest.raises(StartError) as refused:
        engine_of(model, **options)
    return str(refused.value)


def pickled(folder: Path, to: Path, part: str = "unet") -> Path:
    """A copy of a pipeline one part of which has only pickled weights."""
    import torch
    from safetensors.torch import load_file

    shutil.copytree(folder, to)
    (weights,) = (to / part).glob("*.safetensors")
    torch.save(load_file(weights), to / part / "diffusion_pytorch_model.bin")
    weights.unlink()
    return to


def test_loading_tells_how_far_it_is(model: Models) -> None:
    told: list[tuple[float, str]] = []
    one = DiffusersEngine(DiffusersOptions(model=str(model("sd")), offline=True, device="cpu"))
    load_fully(one, lambda share, doing: told.append((share, doing)))
    assert [doing for _, doing in told] == [
        "import torch and diffusers",
        f"read the weights of {model('sd')}",
        "put them on cpu",
        "learn how its unfinished pictures look",
    ]
    shares = [share for share, _ in told]
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] < 1.0


def test_pickled_weights_are_refused_unless_they_are_allowed(model: Models, tmp_path: Path) -> None:
    folder = pickled(model("sd"), tmp_path / "pickled")
    told = why_not(folder)
    assert f"{folder / 'unet'} has no .safetensors file, only pickled weights" in told
    assert "can run any code" in told
    assert "allow_pickle" in told
    assert np.array_equal(
        draw(engine_of(folder, allow_pickle=True), item(1))[0], draw(engine_of(model("sd")), item(1))[0]
    )


def test_a_pickled_single_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "old.ckpt"
    file.write_bytes(b"")
    assert "old.ckpt is no .safetensors file. Weights that are Python pickles" in why_not(file)


def test_a_single_file_without_its_configuration_says_what_is_missing(model: Models, tmp_path: Path) -> None:
    file = shutil.copy(model("sd") / "unet" / "diffusion_pytorch_model.safetensors", tmp_path / "one.safetensors")
    told = why_not(file)
    assert "one.safetensors has weights only; its configuration and tokenizers are those of " in told
    assert "is not in the cache" in told
    assert "Name a folder that has them (config)" in told
    assert "config: " in why_not(file, config=str(tmp_path))


@pytest.mark.parametrize(
    ("model_index", "words"),
    [
        (None, "has no model_index.json, so it is no folder of a diffusers pipeline"),
        ("{", "is not JSON"),
        ({"_class_name": "NoSuchPipeline"}, "NoSuchPipeline is no pipeline that AutoPipelineForText2Image"),
        ({"_class_name": "StableAudioPipeline"}, "StableAudioPipeline is no pipeline that"),
        ({"_class_name": ["pipeline", "Mine"]}, "code of its own, which is never run"),
        ({}, "code of its own, which is never run"),
    ],
    ids=str,
)
def test_a_folder_that_is_no_pipeline_says_why(tmp_path: Path, model_index: Any, words: str) -> None:
    if model_index is not None:
        text = model_index if isinstance(model_index, str) else json.dumps(model_index)
        (tmp_path / "model_index.json").write_text(text)
    assert words in why_not(tmp_path)


def test_code_that_comes_with_a_model_is_never_run(model: Models, tmp_path: Path) -> None:
    folder = tmp_path / "own-code"
    shutil.copytree(model("sd"), folder)
    (folder / "unet" / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": ["mine", "Mine"]}))
    assert "could not be loaded" in why_not(folder)
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_nowhere_says_so(tmp_path: Path) -> None:
    assert "there is no file or folder" in why_not(tmp_path / "nothing")
    assert "there is no file or folder" in why_not("gone.safetensors")
    told = why_not("nobody/nothing")
    assert "nobody/nothing is not in the hub's cache, and the engine is offline" in told
    assert "--offline" in told


def test_a_device_that_is_not_there_says_so(model: Models) -> None:
    import torch

    if torch.cuda.is_available():
        assert "only cuda:0 to" in why_not(model("sd"), device="cuda:99")
    else:
        assert "finds no cuda device here" in why_not(model("sd"), device="cuda")
    assert "there is no GPU to take work off" in why_not(model("sd"), cpu_offload="model")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_numbers_draw_nearly_the_same_picture(model: Models, dtype: str) -> None:
    exact, rough = engine_of(model("sd")), engine_of(model("sd"), dtype=dtype)
    assert rough.statistics().dtype == dtype
    first, second = draw(exact, item(1))[0], draw(rough, item(1))[0]
    assert 0 < np.abs(first.astype(int) - second).mean() < 16


def test_tiles_and_slices_are_turned_on(model: Models) -> None:
    vae = pipe_of(engine_of(model("sd"), vae_tiling=True)).vae
    assert (vae.use_slicing, vae.use_tiling) == (True, True)
    vae = pipe_of(engine_of(model("sd"), vae_slicing=False)).vae
    assert (vae.use_slicing, vae.use_tiling) == (False, False)


PROGRAM = """
import socket, sys
def no_network(*arguments, **more):
    raise AssertionError("the network was used")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no_network
sys.path[:0] = [{root!r}, {source!r}]
from tests.support.drawing import draw, engine_of, item, picture
one = engine_of({model!r})
draw(one, item(1, "many words " * 200), item(2), steps=2, guidance_scale=0.0)
draw(one, item(1, "many words " * 200, images=(picture(),)), steps=4, strength=0.5)
print("drawn")
"""


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_nothing_is_said_and_nobody_is_called_while_it_draws(model: Models, family: str) -> None:
    program = PROGRAM.format(root=str(ROOT), source=str(ROOT / "src"), model=str(model(family)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTHONWARN"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "drawn\n"
    assert done.stderr == ""


def test_a_folder_of_loras_that_is_not_there_is_said(model: Models, tmp_path: Path) -> None:
    with pytest.raises(StartError, match="lora_dir: there is no folder"):
        load_fully(DiffusersEngine(DiffusersOptions(model=str(model("sd")), lora_dir=tmp_path / "nope")))
