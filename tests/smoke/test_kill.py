"""The real gateway, killed under load and started again: nothing that it accepted is lost. `make soak` does it at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

SOAK = Path(__file__).parents[2] / "soak" / "kill_restart.py"


def test_after_three_kills_nothing_is_lost_and_nothing_there_twice(tmp_path: Path) -> None:
    words = ["--kills", "3", "--gap", "0.6", "--clients", "6", "--seed", "7", "--seconds", "60", "--out", str(tmp_path)]
    words += ["--failing", "0"]  # a webhook that fails is not sent again for five seconds
    done = subprocess.run([sys.executable, SOAK, *words], capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("kill_restart-*.json")
    found = json.loads(file.read_text())
    assert found["missed"] == []
    assert len(found["kills"]["drawing"]) == 3
    assert found["jobs"]["succeeded"] > 5
