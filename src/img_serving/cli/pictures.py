"""The pictures of a reply as files: their names, and writing them whole or not at all."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from img_serving.cli.endings import MISUSED, CommandFailed
from img_serving.domain.images import EXTENSIONS, MediaType, OutputFormat
from img_serving.media.sniff import check_picture

STDOUT: Final = "-"
SUFFIXES: Final[dict[str, OutputFormat]] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
"""What the end of a file's name asks for."""

_SLUG_CHARS = 50
_NO_WORD = re.compile(r"[\W_]+")


class Picture(msgspec.Struct, frozen=True):
    """One picture of a reply, decoded."""

    b64_json: bytes
    seed: int | None = None
    revised_prompt: str | None = None


class PicturesReply(msgspec.Struct, frozen=True):
    """What the command line reads of a reply to a generation."""

    data: list[Picture]
    created: int = 0


class Named(msgspec.Struct, frozen=True):
    """A picture with what its own bytes say, and the file that it goes to (None: standard output)."""

    picture: Picture
    media_type: MediaType
    width: int
    height: int
    path: Path | None


def read_pictures(body: bytes) -> list[Picture]:
    """The pictures of a reply.

    Raises:
        CommandFailed: there are none in it.
    """
    try:
        pictures = msgspec.json.decode(body, type=PicturesReply).data
    except msgspec.DecodeError as error:
        raise CommandFailed(f"the answer holds no pictures ({error}): is there an img-serving gateway?") from error
    if not pictures:
        raise CommandFailed("the answer holds no pictures")
    return pictures


def name_all(pictures: list[Picture], output: str | None, prompt: str) -> list[Named]:
    """Where each picture goes.

    Raises:
        CommandFailed: what came is not a picture.
    """
    named = []
    for index, picture in enumerate(pictures):
        try:
            media_type, width, height = check_picture(picture.b64_json)
        except ValueError as error:
            raise CommandFailed(f"picture {index + 1} of the answer cannot be used: {error}") from error
        path: Path | None = None
        if output is None or is_directory(output):
            mark = index + 1 if picture.seed is None else picture.seed
            path = Path(output or "") / f"{slug(prompt)}-{mark}.{EXTENSIONS[media_type]}"
        elif output != STDOUT:
            path = _numbered(Path(output), index + 1, len(pictures))
        named.append(Named(picture, media_type, width, height, path))
    return named


def _numbered(path: Path, place: int, count: int) -> Path:
    """`out.png` for one picture; of several `out-1.png`, `out-2.png` …; or the place where `{i}` stands."""
    if "{i}" in path.name:
        return path.with_name(path.name.replace("{i}", str(place)))
    return path if count == 1 else path.with_name(f"{path.stem}-{place}{path.suffix}")


def slug(prompt: str) -> str:
    """A file name's part from a prompt: letters and digits of every script, dashes between."""
    text = unicodedata.normalize("NFC", prompt).lower()
    return _NO_WORD.sub("-", text).strip("-")[:_SLUG_CHARS].strip("-") or "picture"


def is_directory(output: str) -> bool:
    """Whether `-o` names a directory that the pictures go into, under names of ours."""
    return output.endswith("/") or Path(output).is_dir()


def check_output(output: str | None, count: int) -> None:
    """Refuse what could not be written, before anything is drawn.

    Raises:
        CommandFailed: there is no such directory, or standard output cannot take it.
    """
    if output == STDOUT:
        if count > 1:
            raise CommandFailed("standard output takes one picture: leave -n out, or name files with -o", MISUSED)
        if sys.stdout.isatty():
            raise CommandFailed("a picture is no text for a terminal: pipe it on, or name a file with -o", MISUSED)
        return
    path = Path(output or "")
    directory = path if output is None or is_directory(output) else path.parent
    if not directory.is_dir():
        raise CommandFailed(f"there is no directory {directory}: make it first (mkdir -p {directory})")
    if output is not None and path.exists() and not (path.is_file() or path.is_dir()):
        return  # a device or a pipe is written to, not replaced, so its directory does not matter
    if not os.access(directory, os.W_OK | os.X_OK):
        raise CommandFailed(f"the directory {directory} cannot be written to by this user")


def write_all(named: list[Named]) -> None:
    """Write every picture to its place; each file has its whole content or is as it was before.

    Raises:
        CommandFailed: one cannot be written.
    """
    for one in named:
        if one.path is None:
            sys.stdout.buffer.write(one.picture.b64_json)
            sys.stdout.buffer.flush()
        else:
            try:
                _write(one.path, one.picture.b64_json)
            except OSError as error:
                raise CommandFailed(f"{one.path} cannot be written: {error.strerror or error}") from error


def _write(path: Path, data: bytes) -> None:
    if path.exists() and not path.is_file():  # /dev/null, a pipe: never to be replaced by a file
        path.write_bytes(data)
        return
    target = Path(os.path.realpath(path))  # what a link points to is replaced, not the link
    part = target.with_name(f".img-serving-{os.getpid()}-{os.urandom(4).hex()}.part")
    try:
        with part.open("xb") as file:
            file.write(data)
        part.replace(target)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise
