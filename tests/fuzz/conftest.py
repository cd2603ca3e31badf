"""One program for all the tests of a file: what one of them does to it, the next would see."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.support.edge import Edge, edge


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    with edge(tmp_path_factory.mktemp("edge")) as running:
        yield running
