"""Pictures as files in one directory: written whole or not at all, served by range, swept by age and by size.

Only names that this store gives are ever looked at: a user's own files in the same directory are neither served nor swept.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from img_serving.domain.errors import NotFound, StorageFailed
from img_serving.domain.images import EXTENSIONS
from img_serving.ports import StoredArtifact

MEDIA_TYPE_OF = {extension: media_type for media_type, extension in EXTENSIONS.items()}
"""The media type of each extension that a store gives."""
CHUNK_BYTES = 1 << 20
STALE_TEMPORARY_SECONDS = 3600.0
"""A temporary file this old is nobody's any more: no write takes an hour."""
THREADS = 4

# The prefix is part of the claim that a file is ours: an operator's own pictures may well be named by an MD5 sum.
_NAME = re.compile(r"img-[0-9a-f]{32}\.(?:png|jpg|webp)")
_TEMPORARY = re.compile(r"\.img-[0-9a-f]{32}\.part")
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.EPERM: "no permission",
    errno.ENOENT: "the directory is gone",
    errno.ENOTDIR: "it is not a directory",
    errno.EEXIST: "it is not a directory",
    errno.EFBIG: "the picture is larger than a file may be",
    errno.EMFILE: "too many files are open",
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class StoreSnapshot:
    """What a store did since it started: pictures stored, their bytes, writes that failed, pictures swept."""

    stored: int = 0
    bytes: int = 0
    failures: int = 0
    swept: int = 0


def new_name(extension: str) -> str:
    """An unguessable name (128 random bits).

    Raises:
        ValueError: no picture that we deliver has this extension.
    """
    if extension not in MEDIA_TYPE_OF:
        raise ValueError(f"no picture has the extension {extension!r} (known: {', '.join(MEDIA_TYPE_OF)})")
    return f"img-{secrets.token_hex(16)}.{extension}"


def is_name(name: str) -> bool:
    """Whether a store could have given this name; everything else is nobody's picture, or somebody else's file."""
    return _NAME.fullmatch(name) is not None


def media_type_of(name: str) -> str:
    """The media type of a name that a store gave."""
    return MEDIA_TYPE_OF[name.rpartition(".")[2]]


class LocalDiskStore:
    """Keeps pictures in a directory. Every system call runs in the store's own few threads, never in the event loop's."""

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        ttl_seconds: float | None,
        max_bytes: int,
        is_ours_alone: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`ttl_seconds` None keeps for ever; `max_bytes` 0 is unlimited; `clock` gives Unix seconds. Does no I/O yet.

        `is_ours_alone`: nobody else reads there, and no other process writes: what is half written at the start was left by a
        gateway that died.
        """
        self._directory = Path(directory)
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._is_ours_alone = is_ours_alone
        self._clock = clock
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="local-disk")
        self._counts = StoreSnapshot()
        self._counting = threading.Lock()
        self._sweeping = threading.Lock()

    async def prepare(self) -> None:
        """Make the directory and prove that it can be written to.

        Raises:
            StorageFailed: it cannot; the message names the directory and the reason.
        """
        await self._in_pool(self._prepare)

    async def put(self, data: bytes | memoryview, extension: str, name: str | None = None) -> StoredArtifact:
        """Store atomically and durably; the bytes are not copied. With a `name`, what is there is replaced.

        Raises:
            StorageFailed: the disk is full, read-only or gone. Nothing is left behind.
            ValueError: `name` is none that this store gives.
        """
        if name is not None and not (is_name(name) and name.endswith(f".{extension}")):
            raise ValueError(f"{name!r} is no name of a picture with the extension {extension!r}")
        return await self._in_pool(self._put, data, name or new_name(extension))

    async def find(self, name: str) -> StoredArtifact | None:
        """The picture's record; None if unknown, expired (also before it is swept) or not a name that this store gives.

        Raises:
            StorageFailed: the directory cannot be read.
        """
        return await self._in_pool(self._find, name) if is_name(name) else None

    async def read(self, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes `start` (inclusive) to `stop` (exclusive) in chunks of at most 1 MiB; a sweep meanwhile does not cut it.

        Raises:
            NotFound: there is no such picture (any more).
            StorageFailed: it cannot be read, or ends before `stop`.
        """
        file = await self._open(name)
        try:
            while start < stop:
                chunk = await self._in_pool(self._pread, file, min(CHUNK_BYTES, stop - start), start)
                if not chunk:
                    raise StorageFailed(f"the picture {name} ends before byte {stop}")
                start += len(chunk)
                yield chunk
        finally:
            os.close(file)

    async def delete(self, name: str) -> bool:
        """Remove a picture; whether it was there. What cannot be removed now is left for the sweep."""
        return is_name(name) and await self._in_pool(self._remove, str(self._directory / name))

    async def names(self) -> list[str]:
        """The names of all pictures, expired ones too.

        Raises:
            StorageFailed: the directory cannot be listed.
        """
        return await self._in_pool(self._names)

    async def sweep(self) -> int:
        """Remove what is expired, then the oldest past `max_bytes`, and our own stale temporary files; the pictures gone.

        Raises:
            StorageFailed: the directory cannot be listed.
        """
        return await self._in_pool(self._sweep)

    def path_of(self, name: str) -> str:
        """The picture's absolute path.

        Raises:
            NotFound: not a name that this store gives.
        """
        if not is_name(name):
            raise NotFound("there is no such picture")
        return str((self._directory / name).absolute())

    def snapshot(self) -> StoreSnapshot:
        """What it did so far."""
        return self._counts

    def close(self) -> None:
        """Wait for what is being written and let go of the threads."""
        self._pool.shutdown()

    def __repr__(self) -> str:
        return f"<LocalDiskStore {self._directory} {self._counts}>"

    # from here on: the store's own threads

    def _submit(self, work: Callable[..., _T], *args: object) -> Future[_T]:
        try:
            return self._pool.submit(work, *args)
        except RuntimeError:
            raise StorageFailed("the picture store is closed") from None

    async def _in_pool(self, work: Callable[..., _T], *args: object) -> _T:
        return await asyncio.wrap_future(self._submit(work, *args))

    def _count(self, *, stored: int = 0, stored_bytes: int = 0, failures: int = 0, swept: int = 0) -> None:
        with self._counting:
            now = self._counts
            self._counts = replace(
                now,
                stored=now.stored + stored,
                bytes=now.bytes + stored_bytes,
                failures=now.failures + failures,
                swept=now.swept + swept,
            )

    def _failed(self, what: str, error: OSError) -> StorageFailed:
        reason = _REASONS.get(error.errno or 0) or os.strerror(error.errno or errno.EIO)
        return StorageFailed(f"{what} {self._directory}: {reason}")

    def _prepare(self) -> None:
        probe = self._directory / f".img-{secrets.token_hex(16)}.part"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
            probe.unlink()
            for path in self._directory.iterdir() if self._is_ours_alone else ():
                if _TEMPORARY.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed("pictures cannot be stored in", error) from error

    def _put(self, data: bytes | memoryview, name: str) -> StoredArtifact:
        try:
            try:
                stored = self._write(data, name)
            except FileNotFoundError:
                # Somebody removed the directory while we run: once is made good, twice is meant.
                self._directory.mkdir(parents=True, exist_ok=True)
                stored = self._write(data, name)
        except OSError as error:
            self._count(failures=1)
            raise self._failed("a picture could not be stored in", error) from error
        self._count(stored=1, stored_bytes=stored.size_bytes)
        return stored

    def _write(self, data: bytes | memoryview, name: str) -> StoredArtifact:
        now = self._clock()
        # a name of its own: one that a crash has left behind must not be in the way of the same picture's second try
        temporary = self._directory / f".img-{secrets.token_hex(16)}.part"
        final = self._directory / name
        mode = 0o600 if self._is_ours_alone else 0o644
        file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                rest = memoryview(data).cast("B")
                size = len(rest)
                while rest:
                    rest = rest[os.write(file, rest) :]
                os.utime(file, (now, now))  # age is counted by our clock, whatever the file server's says
                os.fsync(file)
            finally:
                os.close(file)
            temporary.rename(final)
            try:
                self._sync_directory()
            except OSError:
                final.unlink(missing_ok=True)
                raise
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return StoredArtifact(name, media_type_of(name), size, now)

    def _sync_directory(self) -> None:
        directory = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # some network file systems have no such thing
                raise
        finally:
            os.close(directory)

    def _find(self, name: str) -> StoredArtifact | None:
        try:
            status = (self._directory / name).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._failed("pictures cannot be read from", error) from error
        if not stat.S_ISREG(status.st_mode) or self._is_expired(status.st_mtime, self._clock()):
            return None
        return StoredArtifact(name, media_type_of(name), status.st_size, status.st_mtime)

    def _names(self) -> list[str]:
        try:
            with os.scandir(self._directory) as entries:
                return [entry.name for entry in entries if is_name(entry.name)]
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise self._failed("pictures cannot be listed in", error) from error

    def _is_expired(self, modified_at: float, now: float) -> bool:
        return self._ttl_seconds is not None and now - modified_at >= self._ttl_seconds

    async def _open(self, name: str) -> int:
        if not is_name(name):
            raise NotFound("there is no such picture")
        opening = self._submit(os.open, self._directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return await asyncio.wrap_future(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(_close_opened)
            raise
        except FileNotFoundError:
            raise NotFound(f"the picture {name} is gone") from None
        except OSError as error:
            if error.errno == errno.ELOOP:  # a symbolic link: not a file that we wrote
                raise NotFound("there is no such picture") from None
            raise self._failed("pictures cannot be read from", error) from error

    def _pread(self, file: int, count: int, offset: int) -> bytes:
        try:
            return os.pread(file, count, offset)
        except OSError as error:
            raise self._failed("pictures cannot be read from", error) from error

    def _sweep(self) -> int:
        with self._sweeping:
            try:
                swept = self._sweep_directory(self._clock())
            except (FileNotFoundError, NotADirectoryError):
                return 0
            except OSError as error:
                raise self._failed("pictures cannot be listed in", error) from error
            self._count(swept=swept)
            return swept

    def _sweep_directory(self, now: float) -> int:
        swept = 0
        kept: list[tuple[float, str, int]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                ours = is_name(entry.name)
                if not ours and not _TEMPORARY.fullmatch(entry.name):
                    continue
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # it went while we looked
                if not stat.S_ISREG(status.st_mode):
                    continue
                if not ours:
                    if now - status.st_mtime >= STALE_TEMPORARY_SECONDS:
                        self._remove(entry.path)
                elif self._is_expired(status.st_mtime, now):
                    swept += self._remove(entry.path)
                else:
                    kept.append((status.st_mtime, entry.path, status.st_size))
        excess = sum(size for _, _, size in kept) - self._max_bytes if self._max_bytes else 0
        for _, path, size in sorted(kept):
            if excess <= 0:
                break
            if self._remove(path):
                swept += 1
                excess -= size
        return swept

    @staticmethod
    def _remove(path: str) -> bool:
        try:
            Path(path).unlink()
        except OSError:
            return False  # gone already, or not ours to remove: the next sweep asks again
        return True


def _close_opened(opening: Future[int]) -> None:
    """The reader left while the file was being opened: nobody else will close it."""
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())
