"""What the operator may choose, and what is said of what he may not."""

import re
from typing import Any

import pytest

from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"model": " "}, "model: name a folder"),
        ({"device": "gpu"}, "device: auto, cpu, mps, xpu, cuda or cuda:N, not 'gpu'"),
        ({"dtype": "int8"}, "dtype: one of auto, float32"),
        ({"cpu_offload": "disk"}, "cpu_offload: one of none, model, sequential"),
        ({"buckets": ()}, "buckets: ascending"),
        ({"buckets": (4, 2)}, "buckets: ascending"),
        ({"buckets": (0, 2)}, "buckets: ascending"),
        ({"buckets": (1, 65)}, "buckets: from 1 to 64, not 65"),
        ({"max_batch_size": 0}, "max_batch_size: from 1 to 64, not 0"),
        ({"max_batch_size": 2, "buckets": (4,)}, "under the smallest bucket"),
        ({"max_loras": 0}, "max_loras"),
        ({"max_pixels": 0}, "max_pixels"),
        ({"max_steps": 0}, "max_steps"),
        ({"default_steps": 201}, "default_steps: from 1 to 200"),
        ({"default_guidance_scale": -1.0}, "default_guidance_scale: from 0 to 100"),
        ({"true_cfg_scale": 101.0}, "true_cfg_scale: from 0 to 100"),
    ],
    ids=str,
)
def test_an_impossible_option_is_refused_by_name(option: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        DiffusersOptions(**{"model": "here", **option})
    assert str(refused.value).startswith(tuple(f"{name}: " for name in option))


@pytest.mark.parametrize(
    ("option", "most", "sizes"),
    [
        ({}, 8, (1, 2, 4, 8)),
        ({"max_batch_size": 5}, 5, (1, 2, 4)),
        ({"max_batch_size": 20}, 20, (1, 2, 4, 8)),
        ({"buckets": (4,)}, 4, (4,)),
        ({"padding": False}, 8, ()),
        ({"padding": False, "max_batch_size": 3}, 3, ()),
    ],
    ids=str,
)
def test_the_largest_batch_and_what_is_filled_up_to(option: dict[str, Any], most: int, sizes: tuple[int, ...]) -> None:
    options = DiffusersOptions(model="here", **option)
    assert (options.most, options.sizes) == (most, sizes)


def test_an_engine_can_be_made_and_looked_at_before_anything_is_imported() -> None:
    engine = DiffusersEngine(DiffusersOptions(model="no/where", max_batch_size=3))
    assert repr(engine) == "<DiffusersEngine no/where: not loaded>"
    assert engine.capabilities().batch == "items"
    assert engine.capabilities().max_batch_size == 3
    assert engine.statistics().memory_total_bytes == 0
