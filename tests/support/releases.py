"""A small project in a real clone of a real bare repository, and a `docker` that only writes down how it was called."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPTS = ("deploy.sh", "image-tags", "project-version", "release-notes")
CHANGELOG = """# Changelog

## [Unreleased]

## [{version}] - 2026-11-26

### Added

- Pictures of lakes.

### Fixed

- `#` at the start of a line is kept.
"""

FAKE_DOCKER = """#!{python}
import json, os, pathlib, sys
words = sys.argv[1:]
config = os.environ.get("DOCKER_CONFIG")
files = {{path.name: path.is_file() and path.read_text() for path in pathlib.Path(config).iterdir()}} if config else None
text = sys.stdin.read() if words[0] == "login" else None
with open(os.environ["FAKE_DOCKER_LOG"], "a") as log:
    log.write(json.dumps({{"words": words, "stdin": text, "env": dict(os.environ), "config_files": files}}) + "\\n")
if words == ["context", "inspect", "--format", "{{{{.Name}}}}"]:
    print(os.environ.get("FAKE_DOCKER_CONTEXT", "default"))
if words[0] == "login":  # as docker does without a keyring
    (pathlib.Path(config) / "config.json").write_text(json.dumps({{"auths": {{"hub": {{"auth": text}}}}}}))
    print("WARNING! Your credentials are stored unencrypted", file=sys.stderr)
    if os.environ.get("FAKE_DOCKER_FAILS") == "login":
        sys.exit(f"Error response from daemon: unauthorized: {{text}}")
fails = os.environ.get("FAKE_DOCKER_FAILS")
if fails and (words[0] == fails or words[0] == "push" and words[-1].endswith(":" + fails)):
    sys.exit("docker said no")
"""


@dataclass
class Call:
    """How `docker` was called once."""

    words: list[str]
    stdin: str | None
    env: dict[str, str]
    config_files: dict[str, Any] | None

    def values_of(self, option: str) -> list[str]:
        """What follows each `option`."""
        return [value for name, value in zip(self.words, self.words[1:], strict=False) if name == option]


class Project:
    """A clone with one commit, pushed to `main` of a bare repository beside it."""

    def __init__(self, folder: Path) -> None:
        self.remote = folder / "remote.git"
        self.clone = folder / "clone"
        self.home = folder / "home"
        self.programs = folder / "programs"
        self.temporary = folder / "temporary"
        self._log = folder / "docker.jsonl"
        self.environment = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "TMPDIR": str(self.temporary),
            "LC_ALL": "C.UTF-8",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_TERMINAL_PROMPT": "0",
            "FAKE_DOCKER_LOG": str(self._log),
        }

    def make(self) -> None:
        """Make it from nothing; it takes a dozen runs of git, so tests copy one that was made."""
        for each in (self.home, self.programs, self.temporary):
            each.mkdir(parents=True)
        (self.home / ".gitconfig").write_text(
            "[user]\nname = A Maintainer\nemail = maintainer@example.com\n[init]\ndefaultBranch = main\n"
            "[status]\nshowUntrackedFiles = no\n"  # what is not tracked is found all the same
        )
        self.git("init", "--quiet", "--bare", str(self.remote), cwd=self.home)
        self.git("clone", "--quiet", str(self.remote), str(self.clone), cwd=self.home)
        self.git("switch", "--quiet", "-c", "main")
        (self.clone / "scripts").mkdir()
        for name in SCRIPTS:
            shutil.copy(ROOT / "scripts" / name, self.clone / "scripts" / name)
        (self.clone / ".github").mkdir()
        shutil.copy(ROOT / ".github" / "publish-plan", self.clone / ".github" / "publish-plan")
        (self.clone / ".gitignore").write_text(".env\n__pycache__/\n")
        (self.clone / "Dockerfile").write_text("FROM scratch\n")
        self.write_version("1.2.3")
        self.write_notes(CHANGELOG.format(version="1.2.3"))
        self.commit("The first commit")
        self.git("push", "--quiet", "-u", "origin", "main")
        docker = self.programs / "docker"
        docker.write_text(FAKE_DOCKER.format(python=sys.executable))
        docker.chmod(0o755)

    def copy_to(self, folder: Path) -> Project:
        """The same in `folder`, with a remote of its own."""
        copy = Project(folder)
        for name in ("remote", "clone", "home", "programs", "temporary"):
            shutil.copytree(getattr(self, name), getattr(copy, name), symlinks=True)
        config = copy.clone / ".git" / "config"
        config.write_text(config.read_text().replace(str(self.remote), str(copy.remote)))
        return copy

    def git(self, *words: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            ["git", *words], cwd=cwd or self.clone, env=self.environment, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    def write_version(self, version: str) -> None:
        package = self.clone / "src" / "img_serving"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f'"""The program."""\n\n__version__ = "{version}"\n')

    def write_notes(self, text: str) -> None:
        (self.clone / "CHANGELOG.md").write_text(text)

    def run_date(self) -> str:
        """The day where the script runs."""
        return subprocess.run(
            ["date", "+%Y-%m-%d"], env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def commit(self, message: str) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def push_from_elsewhere(self) -> str:
        """Somebody else pushes a commit to `main`; its id."""
        other = self.clone.with_name("other")
        self.git("clone", "--quiet", str(self.remote), str(other), cwd=self.home)
        self.git("commit", "--quiet", "--allow-empty", "-m", "Another's", cwd=other)
        self.git("push", "--quiet", "origin", "HEAD:main", cwd=other)
        return self.git("rev-parse", "HEAD", cwd=other)

    def remote_commit(self, ref: str) -> str | None:
        """The commit that `ref` means on the remote, or None."""
        found = self.git("for-each-ref", "--format=%(*objectname) %(objectname)", ref, cwd=self.remote).split()
        return found[0] if found else None

    def state(self) -> dict[str, Any]:
        """Everything that a refusal or a dry run leaves as it was."""
        files = {
            str(path.relative_to(self.clone)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
            for path in sorted(self.clone.rglob("*"))
            if path.is_file() and ".git" not in path.parts
        }
        return {
            "files": files,
            "here": self.git("for-each-ref"),
            "head": (self.clone / ".git" / "HEAD").read_text(),
            "changes": self.git("status", "--porcelain", "--untracked-files=all"),
            "remote": self.git("for-each-ref", cwd=self.remote),
            "home": sorted(str(path) for path in self.home.rglob("*") if ".git" not in path.parts),
            "temporary": sorted(self.temporary.iterdir()),
        }

    def calls(self) -> list[Call]:
        """How `docker` was called, in order."""
        if not self._log.exists():
            return []
        return [Call(**json.loads(line)) for line in self._log.read_text().splitlines()]

    def deploy(
        self, *words: str, cwd: Path | None = None, before: tuple[str, ...] = (), env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run scripts/deploy.sh; `before` is what it is run by, such as `bash -x`."""
        return subprocess.run(
            [*before, str(self.clone / "scripts" / "deploy.sh"), *words],
            cwd=cwd or self.clone, env={**self.environment, **(env or {})}, stdin=subprocess.DEVNULL,
            check=False, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
