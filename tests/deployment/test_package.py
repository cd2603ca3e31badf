"""The package as people get it: complete, and at work in an environment that has nothing else."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from PIL import Image

from img_serving import __version__

ROOT = Path(__file__).parents[2]
BUILD_SECONDS, INSTALL_SECONDS, START_SECONDS = 120, 400, 60


def tracked() -> list[str]:
    """Every file of the repository, and what may become one. The build goes by `.gitignore` as well."""
    if not (ROOT / ".git").exists():
        pytest.skip("NO REPOSITORY: what belongs into the package is told by git")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source distribution, and the wheel that was made from it: what is missing there is missing here."""
    folder = tmp_path_factory.mktemp("dist")
    hatchling(ROOT, folder, "sdist")
    (folder / "sources").mkdir()
    subprocess.run(["tar", "-xzf", next(folder.glob("*.tar.gz")), "-C", folder / "sources"], check=True)
    hatchling(next((folder / "sources").iterdir()), folder, "wheel")
    return folder


def hatchling(source: Path, into: Path, target: str) -> None:
    command = [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(into)]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=BUILD_SECONDS, check=False)
    assert ended.returncode == 0, ended.stderr


def test_the_source_distribution_is_the_whole_repository(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as sources:
        held = {name.partition("/")[2] for name in sources.getnames()}
    assert [name for name in tracked() if name not in held] == []
    assert held - set(tracked()) == {"PKG-INFO"}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == {name.removeprefix("src/") for name in tracked() if name.startswith("src/")}


def test_the_wheel_says_what_it_is(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        told = {
            name.rpartition("/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist-info/" in name
        }
    assert f"\nVersion: {__version__}\n" in told["METADATA"]
    assert "\nRequires-Python: >=3.11\n" in told["METADATA"]
    assert "\nLicense-Expression: MIT\n" in told["METADATA"]
    assert "img-serving = img_serving.cli:main" in told["entry_points.txt"]
    assert told["LICENSE"] == (ROOT / "LICENSE").read_text()


def emptied() -> dict[str, str]:
    """The environment without anything that could lend the package to a program that does not have it."""
    lent = ("PYTHON", "VIRTUAL_ENV", "IMG_SERVING", "PIPX")
    return {key: value for key, value in os.environ.items() if not key.startswith(lent)}


def install(command: list[str | Path], environment: dict[str, str]) -> None:
    ended = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False
    )
    if re.search("ConnectionError|NewConnectionError|Temporary failure in name resolution", ended.stderr):
        pytest.skip("NO PACKAGE REGISTRY: the dependencies of the wheel cannot be had here")
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module", params=["pip", "pipx"])
def program(request: pytest.FixtureRequest, built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`img-serving` as the wheel installed it, with the newest releases of what it needs: no pins help it."""
    home = tmp_path_factory.mktemp(request.param)
    wheel, environment = next(built.glob("*.whl")), emptied()
    if request.param == "pipx":
        pipx = shutil.which("pipx")
        if pipx is None:
            pytest.skip("NO PIPX: apt install pipx")
        where = {"PIPX_HOME": str(home / "home"), "PIPX_BIN_DIR": str(home / "bin"), "PIPX_MAN_DIR": str(home / "man")}
        install(
            [pipx, "install", "--python", sys.executable, "--pip-args=--no-compile", f"{wheel}[grpc]"],
            environment | where,
        )
        return home / "bin" / "img-serving"
    subprocess.run([sys.executable, "-m", "venv", home / "venv"], check=True, env=environment)
    install([home / "venv" / "bin" / "python", "-m", "pip", "install", "--quiet", "--no-compile", wheel], environment)
    return home / "venv" / "bin" / "img-serving"


def call(program: Path, *arguments: str, cwd: Path) -> str:
    ended = subprocess.run(
        [program, *arguments], cwd=cwd, env=emptied(), capture_output=True, text=True, timeout=120, check=False
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


@pytest.fixture
def serving(program: Path, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """The address and the key of a gateway that the installed program serves, in an empty directory."""
    command: list[str | Path] = [program, "serve", "--host", "127.0.0.1", "--port", "0"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=tmp_path, env=emptied(), stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdout is not None
        try:
            said = ""
            for line in process.stdout:
                said += line
                address, key = (re.search(what, said) for what in (r"listens on (http://\S+?:\d+)", r"once\): (\S+)"))
                if address and key:
                    break
            else:
                raise AssertionError(said + (tmp_path / "log").read_text())
            yield address.group(1), key.group(1)
        finally:
            process.stdout.close()
            process.terminate()
            assert process.wait(timeout=START_SECONDS) == 0


def test_the_wheel_makes_a_picture_in_an_empty_environment(program: Path, tmp_path: Path) -> None:
    assert __version__ in call(program, "--version", cwd=tmp_path)
    call(program, "generate", "a lake at dawn", "--local", "--size", "256x128", "-o", "lake.png", cwd=tmp_path)
    with Image.open(tmp_path / "lake.png") as picture:
        assert (picture.format, picture.size) == ("PNG", (256, 128))


def test_the_wheel_serves_a_picture_in_an_empty_environment(serving: tuple[str, str]) -> None:
    url, key = serving
    body = b'{"prompt": "a lake at dawn", "size": "256x128"}'
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/images/generations", body, headers), timeout=60) as reply:  # noqa: S310
        link = re.search(rb'"url":\s*"([^"]+)"', reply.read())
    assert link is not None
    with urlopen(link.group(1).decode(), timeout=60) as reply:  # noqa: S310
        picture = Image.open(io.BytesIO(reply.read()))
    assert (picture.format, picture.size) == ("PNG", (256, 128))
