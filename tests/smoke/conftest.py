"""One program that several smoke tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.programs import Program, serving


@pytest.fixture(scope="module")
def shared_program(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    with serving(tmp_path_factory.mktemp("program")) as program:
        yield program
