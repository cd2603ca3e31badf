"""A file imports its own floor and lower ones only; neighbours on floor 3 never import each other."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "img_serving"

FLOORS = {
    "domain": 0,
    "policy": 1,
    "config": 1,
    "ports": 2,
    "media": 2,
    "transport": 2,
    "wire": 2,
    "telemetry": 2,
    "simulation": 2,
    "engines": 3.0,
    "backends": 3.1,
    "storage": 3.1,
    "state": 3.1,
    "gateway": 3.1,
    "api": 4,
    "worker": 4,
    "main": 5,
    "cli": 6,
    "__main__": 7,
}
NEIGHBOURS = {"backends", "storage", "state", "gateway"}
PURE = {"domain", "policy", "simulation"}
FORBIDDEN_IN_PURE = {"asyncio", "logging", "time", "socket", "os", "threading", "subprocess", "uvloop", "httptools"}
LATE = {"numpy", "PIL", "grpc", "isal", "rich", "torch", "diffusers", "transformers", "peft"}
PAINTER = SOURCE / "engines" / "procedural"
"""Its rooms are arithmetic on arrays and may import numpy as they load: main.py imports them with the first picture."""
SPEAK_GRPC = [
    SOURCE / "wire",
    SOURCE / "backends" / "rpc.py",
    SOURCE / "backends" / "grpc",
    SOURCE / "backends" / "kserve",
    SOURCE / "worker",
]
"""main.py imports an adapter when a backend of its protocol is configured; the worker is another program."""


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def module_level_imports(path: Path) -> list[str]:
    """Imports that run when the module is loaded: at its top and inside classes, not in functions or TYPE_CHECKING."""
    names: list[str] = []
    pending: list[ast.AST] = list(ast.parse(path.read_text()).body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
        elif isinstance(node, ast.If):
            if "TYPE_CHECKING" not in ast.unparse(node.test):
                pending += [*node.body, *node.orelse]
        elif isinstance(node, (ast.Try, ast.ClassDef)):
            pending += node.body
    return names


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py" and "_pb2" not in path.name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_its_own_floor_and_lower_ones_only(path: Path) -> None:
    here = room(path)
    assert here in FLOORS, f"{here} has no floor"
    for name in imports(path):
        match = re.match(r"img_serving\.(\w+)", name)
        if match is None or match.group(1) == "__version__":
            continue
        there = match.group(1)
        assert there in FLOORS, f"{path} imports {name}, which has no floor"
        assert FLOORS[there] <= FLOORS[here], f"{path} (floor {FLOORS[here]}) imports {name} (floor {FLOORS[there]})"
        if here in NEIGHBOURS and there in NEIGHBOURS:
            assert here == there, f"{path}: {here} and {there} are neighbours; main.py introduces them"


@pytest.mark.parametrize(
    "path", [path for path in FILES if room(path) in PURE], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_pure_floors_have_no_clock_no_io_and_no_logging(path: Path) -> None:
    found = {name.partition(".")[0] for name in imports(path)} & FORBIDDEN_IN_PURE
    assert not found, f"{path} imports {sorted(found)}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_heavy_libraries_are_not_imported_when_a_module_is_loaded(path: Path) -> None:
    found = {name.partition(".")[0] for name in module_level_imports(path)} & LATE
    if path.is_relative_to(PAINTER):
        found.discard("numpy")
    if any(path.is_relative_to(one) for one in SPEAK_GRPC):
        found.discard("grpc")
    if room(path) != "cli":
        assert not found, f"{path} imports {sorted(found)} on the start path"


def test_starting_imports_no_heavy_library() -> None:
    program = f"import sys, img_serving.main; print(*(name for name in {sorted(LATE)} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_opens_with_one_sentence_that_says_what_it_owns(path: Path) -> None:
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text, f"{path} has no docstring"
    assert re.search(r"[.?!](\s|$)", text), f"{path}: the first sentence does not end"
