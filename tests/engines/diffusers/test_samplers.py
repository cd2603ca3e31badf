"""Samplers and schedules by name: all that are offered draw, none carries anything from one drawing to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tests.support.drawing import draw, item, most_different, pipe_of

pytest.importorskip("torch", reason="NO TORCH: make test-diffusers runs this in an environment that has it")
pytest.importorskip("diffusers", reason="NO DIFFUSERS: make test-diffusers runs this in an environment that has it")

Engines = Callable[..., Any]


def offered(one: Any) -> list[str]:
    samplers = one.capabilities().samplers
    return list(samplers.names) if samplers is not None else []


@pytest.mark.parametrize("family", ["sd", "sd3", "flux"])
def test_every_sampler_that_is_offered_draws_and_draws_the_same_again_in_company(engine: Engines, family: str) -> None:
    one = engine(family, buckets=(2,))
    pictures = {}
    for name in offered(one):
        first = draw(one, item(1), sampler=name)[0]
        again = draw(one, item(2), item(1), sampler=name)[1]
        assert np.array_equal(first, again), name
        pictures[name] = first
    assert np.array_equal(draw(one, item(1))[0], draw(one, item(1))[0])
    kinds = {picture.tobytes() for picture in pictures.values()}
    assert len(kinds) >= 0.8 * len(pictures)  # a few are the same mathematics


def test_every_sampler_draws_with_a_single_step(engine: Engines) -> None:
    one = engine("sd", buckets=(2,))
    for name in offered(one):
        draw(one, item(1), sampler=name, steps=1)


def test_what_is_offered_fits_the_model(engine: Engines) -> None:
    noise, flow, dynamic = (set(offered(engine(family))) for family in ("sd", "sd3", "flux"))
    assert {"Euler", "Euler a", "DPM++ 2M", "DPM++ 2M Karras", "DDIM", "UniPC", "LCM", "Heun"} <= noise
    assert {"Euler", "Heun", "DPM++ 2M", "UniPC"} <= flow
    assert not {"Euler a", "DDIM", "LCM", "DPM++ 2M Karras"} & flow
    assert "Heun" not in dynamic


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("euler_a", "EulerAncestralDiscreteScheduler", {}),
        ("DPMPP_2M", "DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
        ("dpm++ 2m karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("plms", "PNDMScheduler", {"skip_prk_steps": True}),
        ("lcm", "LCMScheduler", {}),
    ],
)
def test_a_name_means_a_scheduler_of_the_models_own_numbers(
    engine: Engines, name: str, scheduler: str, options: dict[str, Any]
) -> None:
    from img_serving.engines.diffusers.quiet import hushed

    samplers = engine("sd")._samplers
    with hushed():
        made, other = (samplers.make(samplers.choose(name, None)) for _ in range(2))
    assert type(made).__name__ == scheduler
    assert made.config.beta_schedule == "scaled_linear"
    assert {key: made.config[key] for key in options} == options
    assert other is not made


def test_a_schedule_in_a_samplers_name_or_beside_it_is_the_same(engine: Engines) -> None:
    one = engine("sdxl", buckets=(1,))
    in_name = draw(one, item(1), sampler="DPM++ 2M Karras")[0]
    beside = draw(one, item(1), sampler="DPM++ 2M", scheduler="karras")[0]
    assert np.array_equal(in_name, beside)
    assert most_different(in_name, draw(one, item(1), sampler="DPM++ 2M")[0]) > 0
    assert np.array_equal(draw(one, item(1), scheduler="automatic")[0], draw(one, item(1))[0])
    own = draw(one, item(1), scheduler="karras")[0]
    assert np.array_equal(own, draw(one, item(1), sampler="Euler Karras")[0])


def test_the_models_own_scheduler_is_back_after_a_call(engine: Engines) -> None:
    one = engine("sd")
    own = pipe_of(one).scheduler
    draw(one, item(1), sampler="Heun")
    assert pipe_of(one).scheduler is own
