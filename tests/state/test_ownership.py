"""One gateway at a time has a data directory, and nothing is in the way of the next one after a crash."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from img_serving.domain.errors import StartError
from img_serving.state.ownership import LOCK_FILE, owned

HOLD = """
import sys, pathlib
from img_serving.state.ownership import owned
with owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_second_is_told_who_has_it(tmp_path: Path) -> None:
    with (
        owned(tmp_path),
        pytest.raises(StartError, match=r"another gateway is running.*set server\.data_dir"),
        owned(tmp_path),
    ):
        pass
    with owned(tmp_path):
        assert (tmp_path / LOCK_FILE).stat().st_mode & 0o777 == 0o600


def test_a_killed_process_leaves_no_lock(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process.stdin, process.stdout:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(StartError), owned(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
    with owned(tmp_path):
        pass
