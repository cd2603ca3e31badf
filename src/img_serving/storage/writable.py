"""Proves at the start that a directory can be written, and says in one line what to do where it cannot.

The same line is read on a machine and in a container's log, where the command has to be run on the host.
"""

from __future__ import annotations

import errno
import os
import secrets
import shlex
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from img_serving.domain.errors import StartError


def prove_writable(directory: Path, *, what: str, setting: str, ours: Iterable[str] = ()) -> None:
    """Make the directory, write to it, and look at the files `ours` of it that are there already.

    `what` it is to people; `setting` is where another one is configured.

    Raises:
        StartError: this user cannot write there; the message has the way out.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / f".writable-{secrets.token_hex(8)}"
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        with suppress(FileNotFoundError):
            probe.unlink()
        for path in (directory / name for name in ours):
            if path.exists() and not os.access(path, os.R_OK | os.W_OK):
                raise PermissionError(errno.EACCES, f"{path.name} is another user's")
    except OSError as error:
        raise StartError(_told(directory.absolute(), what, setting, error)) from error


def _told(path: Path, what: str, setting: str, error: OSError) -> str:
    owner = f"{os.getuid()}:{os.getgid()}"
    reason = "it is not a directory" if error.errno in {errno.EEXIST, errno.ENOTDIR} else error.strerror or error
    said = f"{what} {path} cannot be written by the user {owner} ({reason})"
    if error.errno in {errno.EACCES, errno.EPERM} and not os.path.lexists(path):
        uid, gid = os.getuid(), os.getgid()
        return f"{said}: run `sudo install -d -o {uid} -g {gid} {shlex.quote(str(path))}`, or set {setting}"
    if error.errno in {errno.EACCES, errno.EPERM}:
        return (
            f"{said}: run `sudo chown -R {owner} {shlex.quote(str(path))}` (for a container: on the host, naming the directory "
            f"that is mounted there), or set {setting}"
        )
    if error.errno == errno.EROFS:
        return (
            f"{said}: mount something writable there (for a container: `-v DIRECTORY-OR-VOLUME:{path}`, without `:ro`), "
            f"or set {setting}"
        )
    return f"{said}: put that right, or set {setting}"
