"""Which class a name means, and what is said when it means none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from img_serving.domain.errors import StartError
from img_serving.worker.engines import own_engine

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "custom_worker"

ENGINE = """
class Toy:
    def __init__(self, model="none"):
        self.model = model
    def load(self): pass
    def capabilities(self): pass
    def generate(self, batch, on_step): pass

class Bare(Toy):
    def __init__(self):
        pass

class Half:
    def load(self): pass

word = "no class"
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "toy_engine.py"
    path.write_text(ENGINE)
    return path


@pytest.mark.parametrize(("model", "made_with"), [(None, "none"), ("./weights", "./weights")])
def test_a_class_in_a_file_is_made_with_its_model(file: Path, model: str | None, made_with: str) -> None:
    engine = own_engine(f"{file}:Toy", model)()
    assert getattr(engine, "model", None) == made_with


def test_a_class_in_a_module_beside_the_command_is_found(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert type(own_engine("toy_engine:Toy", None)()).__name__ == "Toy"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gradient", "it is procedural or diffusers, or a class of yours as module:Class"),
        ("{file}:Nobody", "has no class 'Nobody'; it has Toy, Bare"),
        ("{file}:Half", "has no method capabilities and no generate"),
        ("{file}:word", "is no engine"),
        ("no_such_module_here:Toy", "there is no module 'no_such_module_here'"),
        ("{folder}/nowhere.py:Toy", "there is no file"),
        ("{folder}/broken.py:Toy", "cannot be imported: ZeroDivisionError"),
        ("{folder}/needy.py:Toy", "needs the module 'nobody_has_this', which is not installed"),
    ],
)
def test_what_is_no_engine_is_said(file: Path, name: str, words: str) -> None:
    (file.parent / "broken.py").write_text("1 / 0")
    (file.parent / "needy.py").write_text("import nobody_has_this")
    with pytest.raises(StartError, match=words.replace("(", r"\(")):
        own_engine(name.format(file=file, folder=file.parent), None)


def test_a_class_that_takes_no_model_says_so(file: Path) -> None:
    with pytest.raises(StartError, match="cannot be made with"):
        own_engine(f"{file}:Bare", "./weights")()


def test_the_examples_pass_their_own_tests_without_a_gateway() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-c",
            "/dev/null",
            "--rootdir",
            ".",
            "-p",
            "no:cacheprovider",
            ".",
        ],
        cwd=EXAMPLE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 passed" in done.stdout
