"""Unfinished pictures: small, in the model's own colours, and never in the way."""

from __future__ import annotations

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image
from tests.support.drawing import call, item

from img_serving.engines.engine import OnStep, load_fully

pytest.importorskip("torch", reason="NO TORCH: make test-diffusers runs this in an environment that has it")
pytest.importorskip("diffusers", reason="NO DIFFUSERS: make test-diffusers runs this in an environment that has it")

Engines = Callable[..., Any]


def ticking(model: Any, seconds: float) -> Any:
    """An engine whose clock goes on by so much whenever it is looked at."""
    from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions

    now = 0.0

    def clock() -> float:
        nonlocal now
        now += seconds
        return now

    one = DiffusersEngine(DiffusersOptions(model=str(model), offline=True, device="cpu"), clock=clock)
    load_fully(one)
    return one


def shown(one: Any, *items: Any, **request: Any) -> list[tuple[int, Any]]:
    """(step, preview) of all previews."""
    seen: list[tuple[int, Any]] = []
    on_step = OnStep(lambda done, _, previews: seen.extend((done, preview) for preview in previews))
    one.generate(call(*items, **request), on_step)
    return seen


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "flux"])
def test_each_picture_is_shown_as_a_small_jpeg(model: Engines, family: str) -> None:
    one = ticking(model(family), 1.0)
    assert one._looks.is_fitted
    seen = shown(one, item(1), item(2), item(3), previews=True, steps=3, width=128)
    assert {preview.index for _, preview in seen} == {0, 1, 2}
    for _, preview in seen:
        assert preview.media_type == "image/jpeg"
        assert len(preview.data) < 8_000
        assert Image.open(io.BytesIO(preview.data)).size == (16, 8)
    assert all(step < 3 for step, _ in seen)


def test_nothing_is_shown_to_those_who_do_not_ask(model: Engines) -> None:
    assert shown(ticking(model("sd"), 1.0), item(1)) == []


def test_previews_take_a_small_share_of_the_time_only(model: Engines) -> None:
    """One that takes a second is not made again for half a minute, but at the quarters of the picture."""
    one = ticking(model("sd"), 1.0)
    seen = shown(one, item(1), previews=True, steps=50)
    steps = [step for step, _ in seen]
    assert steps[0] == 1
    quarters = {13, 25, 38}
    assert quarters <= set(steps)
    others = [step for step in steps if step not in quarters]
    assert all(gap >= 10 for gap in np.diff(others))  # of a clock that is looked at some three times a step
    assert [preview.share for _, preview in seen] == [step / 50 for step in steps]


def test_a_quick_picture_of_four_steps_is_shown_three_times(model: Engines) -> None:
    """Exactly what a stream of three unfinished pictures waits for."""
    seen = shown(ticking(model("sd"), 0.001), item(1), item(2), previews=True, steps=4)
    shares = [(preview.index, preview.share) for _, preview in seen]
    assert sorted(shares) == [(index, share) for index in (0, 1) for share in (0.25, 0.5, 0.75)]


class _Mixer:
    """A VAE that averages 8 x 8 pixels and mixes their colours into six channels: what a linear map can undo."""

    config: ClassVar[dict[str, Any]] = {"shift_factor": 0.1, "scaling_factor": 1.5}

    def __init__(self) -> None:
        import torch

        self.dtype, self.device = torch.float32, torch.device("cpu")
        self._mix = torch.randn(6, 3, generator=torch.Generator().manual_seed(3)) * 0.2

    def encode(self, pictures: Any) -> Any:
        import torch

        latents = torch.einsum("cr,nrhw->nchw", self._mix, torch.nn.functional.avg_pool2d(pictures, 8))
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latents))


def test_the_map_is_fitted_to_the_models_own_vae() -> None:
    import torch

    from img_serving.engines.diffusers.previews import _encoded, fitted

    vae = _Mixer()
    looks = fitted(SimpleNamespace(vae=vae))
    assert looks.is_fitted
    for colour in ((240, 120, 10), (0, 128, 128), (250, 250, 250)):
        pixels = torch.tensor(colour).view(1, 3, 1, 1).expand(1, 3, 64, 64) / 127.5 - 1.0
        shown_colour = looks.of(_encoded(vae, pixels))[0].mean(axis=(0, 1))
        assert np.abs(shown_colour - np.array(colour)).max() < 8


def test_a_vae_that_cannot_be_fitted_is_no_reason_not_to_draw() -> None:
    from img_serving.engines.diffusers.previews import fitted

    assert not fitted(SimpleNamespace(vae=None)).is_fitted


def test_latents_of_an_unknown_kind_are_shown_by_their_first_channels() -> None:
    import torch

    from img_serving.engines.diffusers.previews import Looks, unpacked

    looks = Looks()
    assert not looks.is_fitted
    assert looks.of(torch.randn(2, 32, 6, 5)).shape == (2, 6, 5, 3)
    assert looks.of(torch.full((1, 1, 4, 4), float("nan"))).shape == (1, 4, 4, 3)
    assert unpacked(torch.randn(1, 7, 64), 64, 64) is None
    assert unpacked(torch.randn(5), 64, 64) is None


def test_packed_latents_are_unpacked_as_their_pipeline_does_it() -> None:
    import diffusers
    import torch

    from img_serving.engines.diffusers.previews import unpacked

    latents = torch.randn(2, 16, 8, 12)
    packed = diffusers.FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(unpacked(packed, 96, 64), latents)
    assert torch.equal(unpacked(latents.unsqueeze(2), 96, 64), latents)
