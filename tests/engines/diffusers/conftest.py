"""Tiny pipelines with random weights, written once a process; where diffusers is missing, what needs them is skipped aloud."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

Models = Callable[..., Path]


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """`model("sdxl")` is the folder of a tiny SDXL."""
    import torch
    from tests.support import tiny_pipelines

    torch.set_num_threads(1)  # tiny networks gain nothing by more, and lose much where several processes test

    @cache
    def made(family: str, **change: Any) -> Path:
        from img_serving.engines.diffusers.quiet import hushed

        with hushed():
            return tiny_pipelines.make(family, tmp_path_factory.mktemp(family), **change)

    return made


@pytest.fixture(scope="session")
def engine(model: Models) -> Callable[..., Any]:
    """`engine("sdxl", buckets=(4,))` is loaded once for all tests that ask for the same."""
    from tests.support.drawing import engine_of

    @cache
    def loaded(family: str, **options: Any) -> Any:
        return engine_of(model(family), **options)

    return loaded
