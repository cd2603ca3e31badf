"""`version` and `--version`."""

from __future__ import annotations

import pytest

from img_serving import __version__
from img_serving.cli import main


@pytest.mark.parametrize("words", [["version"], ["--version"]])
def test_both_spellings_show_the_one_version(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    assert capsys.readouterr().out == f"img-serving {__version__}\n"
