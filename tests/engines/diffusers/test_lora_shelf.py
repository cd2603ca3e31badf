"""LoRAs on a pipeline: what they do, whose they are, how long they stay, and that nothing of them is left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tests.support.drawing import call, draw, engine_of, item, most_different, picture, pipe_of

from img_serving.domain.images import ItemFailure
from img_serving.engines.engine import GenerationCancelled, OnStep

pytest.importorskip("torch", reason="NO TORCH: make test-diffusers runs this in an environment that has it")
pytest.importorskip("diffusers", reason="NO DIFFUSERS: make test-diffusers runs this in an environment that has it")

Models = Callable[..., Path]
FAMILIES = ("sd", "sdxl", "sd3", "flux")


@pytest.fixture(scope="session")
def loras(model: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each family with `ink`, `oil` and `chalk`."""
    import diffusers
    from tests.support.tiny_pipelines import make_lora

    from img_serving.engines.diffusers.quiet import hushed

    folders = {}
    for family in FAMILIES:
        folders[family] = tmp_path_factory.mktemp(f"loras-{family}")
        with hushed():
            pipe = diffusers.AutoPipelineForText2Image.from_pretrained(model(family), local_files_only=True)
            for seed, name in enumerate(("ink", "oil", "chalk")):
                make_lora(pipe, folders[family] / f"{name}.safetensors", seed=seed)
    return folders


@pytest.mark.parametrize("family", FAMILIES)
def test_a_lora_acts_by_its_weight_on_its_own_picture_and_is_gone_after(
    model: Models, loras: dict[str, Path], family: str
) -> None:
    one = engine_of(model(family), lora_dir=loras[family], buckets=(2,), max_batch_size=4)
    plain = draw(one, item(1))[0]
    mixed = draw(
        one, item(1, "a cat <lora:ink>"), item(1), item(1, "a cat <lora:ink:0.3>"), item(1, "a cat <lora:oil>")
    )
    assert np.array_equal(mixed[1], plain)
    different = {picture.tobytes() for picture in mixed}
    assert len(different) == 4
    for prompt, first in zip(["a cat<lora:ink>", "a cat", "a cat <lora:ink:.3>"], mixed, strict=False):
        assert np.array_equal(draw(one, item(1, prompt))[0], first)
    assert np.array_equal(draw(one, item(1))[0], plain)
    assert np.array_equal(draw(one, item(1, "a cat <lora:ink:0>"))[0], plain)
    assert one.statistics().loras == 2


def test_two_loras_act_together_and_edits_wear_them_too(model: Models, loras: dict[str, Path]) -> None:
    one = engine_of(model("sd"), lora_dir=loras["sd"], buckets=(1,), max_batch_size=4)
    both, ink = (draw(one, item(1, f"a cat {tags}"))[0] for tags in ("<lora:ink><lora:oil>", "<lora:ink>"))
    assert most_different(both, ink) > 0
    edits = [item(1, f"a cat {tag}", images=(picture(),)) for tag in ("", "<lora:ink>")]
    assert most_different(*draw(one, *edits, strength=0.5)) > 0


def test_an_unknown_lora_fails_alone_and_names_the_nearest(model: Models, loras: dict[str, Path]) -> None:
    one = engine_of(model("sd"), lora_dir=loras["sd"])
    failed, drawn = one.generate(call(item(1, "a <lora:inc>"), item(1)), OnStep())
    assert isinstance(failed, ItemFailure)
    assert failed.refused
    assert failed.message == "there is no LoRA 'inc'; the nearest it has: ink"
    assert isinstance(drawn, np.ndarray)


def test_a_file_that_does_not_fit_fails_alone_and_leaves_nothing(
    model: Models, loras: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copy(loras["sdxl"] / "ink.safetensors", tmp_path / "wrong.safetensors")
    shutil.copy(loras["flux"] / "ink.safetensors", tmp_path / "other.safetensors")
    shutil.copy(loras["sd"] / "ink.safetensors", tmp_path / "right.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"not a safetensors file")
    one = engine_of(model("sd"), lora_dir=tmp_path, buckets=(1,), max_batch_size=8)
    plain = draw(one, item(1))[0]
    prompts = ["a cat <lora:wrong>", "a cat <lora:other>", "a cat <lora:broken>", "a cat <lora:right>", "a cat"]
    results = one.generate(call(*(item(1, prompt) for prompt in prompts)), OnStep())
    for failed, name in zip(results, ("wrong", "other", "broken"), strict=False):
        assert failed == ItemFailure(f"LoRA '{name}' does not fit this model", refused=True)
    assert most_different(np.asarray(results[3]), plain) > 0
    assert np.array_equal(np.asarray(results[4]), plain)
    assert one.statistics().loras == 1


def test_so_many_stay_loaded_and_a_file_that_was_written_anew_is_another(
    model: Models, loras: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "loras"
    shutil.copytree(loras["sd"], folder)
    one = engine_of(model("sd"), lora_dir=folder, max_loras=2, buckets=(1,))
    first = draw(one, item(1, "a cat <lora:ink>"))[0]
    for name in ("oil", "chalk"):
        draw(one, item(1, f"a cat <lora:{name}>"))
    assert one.statistics().loras == 2
    assert len(pipe_of(one).get_list_adapters()["unet"]) == 2
    assert np.array_equal(draw(one, item(1, "a cat <lora:ink>"))[0], first)
    shutil.copy(folder / "oil.safetensors", folder / "ink.safetensors")
    os.utime(folder / "ink.safetensors", ns=(1, 1))
    assert np.array_equal(draw(one, item(1, "a cat <lora:ink>"))[0], draw(one, item(1, "a cat <lora:oil>"))[0])
    (folder / "ink.safetensors").unlink()
    (failed,) = one.generate(call(item(1, "a cat <lora:ink>")), OnStep())
    assert isinstance(failed, ItemFailure)


def test_stopped_while_it_wears_one_the_pipeline_draws_bare_again(model: Models, loras: dict[str, Path]) -> None:
    one = engine_of(model("sdxl"), lora_dir=loras["sdxl"], buckets=(1,))
    plain = draw(one, item(1))[0]
    told: list[int] = []
    with pytest.raises(GenerationCancelled):
        draw(
            one, item(1, "a cat <lora:ink>"), on_step=OnStep(lambda done, *_: told.append(done), lambda: len(told) == 2)
        )
    assert np.array_equal(draw(one, item(1))[0], plain)
