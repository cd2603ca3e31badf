"""What tests of a release start from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from tests.support.releases import Project


@pytest.fixture(scope="session")
def first_project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    if shutil.which("git") is None:
        pytest.skip("NO GIT: nothing can be released")
    made = Project(tmp_path_factory.mktemp("project"))
    made.make()
    return made


@pytest.fixture
def project(first_project: Project, tmp_path: Path) -> Project:
    return first_project.copy_to(tmp_path)
