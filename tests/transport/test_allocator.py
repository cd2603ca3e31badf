"""Tuning the allocator is harmless wherever it is tried."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn

import pytest

from img_serving.transport.allocator import tune_allocator


def test_glibc_takes_the_settings_and_memory_comes_back() -> None:
    """In a process of its own: 32 bodies of 2 MB are held, let go, and most of their memory is given back."""
    if not sys.platform.startswith("linux") or not (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
        pytest.skip("not glibc")
    program = (
        "import pathlib\n"
        "from img_serving.transport.allocator import tune_allocator\n"
        "def resident(): return int(pathlib.Path('/proc/self/statm').read_text().split()[1]) * 4096\n"
        "assert tune_allocator()\n"
        "before = resident()\n"
        "for _ in range(3):\n"
        "    bodies = [bytearray(2_000_000) for _ in range(64)]\n"
        "    del bodies\n"
        "print((resident() - before) // 1_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 80


@pytest.mark.parametrize("name", ["musl 1.2", "", None])
def test_other_libraries_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str | None) -> None:
    monkeypatch.setattr(os, "confstr", lambda _: name)
    assert tune_allocator() is False


@pytest.mark.parametrize("error", [ValueError("unrecognized configuration name"), OSError(22, "x")])
def test_it_never_raises(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(_: str) -> NoReturn:
        raise error

    failing: Callable[[str], NoReturn] = fail
    monkeypatch.setattr(os, "confstr", failing)
    assert tune_allocator() is False
