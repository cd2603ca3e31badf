"""A directory that cannot be written ends the start with one line that names it and the way out."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from img_serving.domain.errors import StartError
from img_serving.storage.writable import prove_writable

UNWRITABLE = "/sys/kernel/img-serving"
"""Nobody can make it, root neither."""


def refusal_of(directory: Path, *ours: str) -> str:
    with pytest.raises(StartError) as told:
        prove_writable(directory, what="the data directory", setting="server.data_dir", ours=ours)
    return str(told.value)


def refuse_with(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)


def test_it_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    prove_writable(tmp_path / "a" / "b", what="it", setting="x.y")
    assert list((tmp_path / "a" / "b").iterdir()) == []


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_no_permission_names_the_command_for_this_user(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_with(code, monkeypatch)
    place = tmp_path / "with blank"
    told = refusal_of(place)
    assert f"the data directory {place} cannot be written" in told
    assert f"`sudo chown -R {os.getuid()}:{os.getgid()} '{place}'`" in told
    assert "on the host" in told
    assert "or set server.data_dir" in told


def test_the_command_for_what_cannot_even_be_made_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **more: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    place = tmp_path / "missing" / "data"
    assert f"`sudo install -d -o {os.getuid()} -g {os.getgid()} {place}`" in refusal_of(place)


def test_a_read_only_mount_is_not_cured_by_another_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_with(errno.EROFS, monkeypatch)
    told = refusal_of(tmp_path)
    assert "chown" not in told
    assert f":{tmp_path}`, without `:ro`" in told


def test_a_full_disk_is_said_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_with(errno.ENOSPC, monkeypatch)
    told = refusal_of(tmp_path)
    assert os.strerror(errno.ENOSPC) in told
    assert "chown" not in told


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_file_in_its_place_is_said(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "it is not a directory" in refusal_of(tmp_path / place)


def test_a_file_of_ours_that_another_user_owns_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "state.db").touch()
    (tmp_path / "lost+found").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "state.db is another user's" in refusal_of(tmp_path, "state.lock", "state.db")
    prove_writable(tmp_path, what="it", setting="x.y", ours=("state.lock",))  # what is not ours is not looked at


@pytest.mark.parametrize("setting", ["server.data_dir", "storage.dir"])
def test_the_program_ends_with_one_line(setting: str, tmp_path: Path) -> None:
    section, _, key = setting.partition(".")
    env = {name: value for name, value in os.environ.items() if not name.startswith("IMG_SERVING")}
    ended = subprocess.run(
        [sys.executable, "-m", "img_serving", "serve", "--host", "127.0.0.1", "--port", "0"],
        cwd=tmp_path, env={**env, f"IMG_SERVING__{section.upper()}__{key.upper()}": UNWRITABLE},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert UNWRITABLE in ended.stderr
    assert f"or set {setting}" in ended.stderr
