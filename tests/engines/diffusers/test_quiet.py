"""What is said where libraries are missing, and that no more of them is imported than is needed."""

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from img_serving.domain.errors import StartError
from img_serving.engines.diffusers.quiet import import_libraries


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name in {"torch", "peft"} else object() if "." not in name else find(name, *more)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    with pytest.raises(StartError, match=r"needs torch, peft.*its extra `diffusers`"):
        import_libraries(offline=False)


def test_the_package_is_imported_without_torch() -> None:
    program = (
        "import sys; from img_serving.engines.diffusers import DiffusersEngine, DiffusersOptions; "
        "DiffusersEngine(DiffusersOptions(model='x')); "
        "print(*(name for name in ('torch', 'diffusers', 'transformers', 'numpy', 'PIL') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
