"""Pictures in memory, bounded: for tests and for drawing without a server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace

from img_serving.domain.errors import NotFound, StorageFailed
from img_serving.ports import StoredArtifact
from img_serving.storage.local_disk import CHUNK_BYTES, StoreSnapshot, is_name, media_type_of, new_name


class MemoryStore:
    """Keeps at most `max_bytes` of pictures: a new one pushes the oldest out."""

    def __init__(
        self,
        *,
        ttl_seconds: float | None = None,
        max_bytes: int = 256 << 20,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`ttl_seconds` None keeps for as long as there is room; `max_bytes` is above zero; `clock` gives Unix seconds."""
        if max_bytes <= 0:
            raise ValueError("a store in memory must be bounded: max_bytes has to be above 0")
        self._ttl_seconds = ttl_seconds
        self._max_bytes = max_bytes
        self._clock = clock
        self._pictures: dict[str, tuple[bytes, StoredArtifact]] = {}
        self._held_bytes = 0
        self._counts = StoreSnapshot()

    async def prepare(self) -> None:
        """Nothing to make: memory is always writable."""

    async def put(self, data: bytes | memoryview, extension: str, name: str | None = None) -> StoredArtifact:
        """Store a copy. With a `name`, what is there is replaced.

        Raises:
            StorageFailed: the picture alone is over `max_bytes`.
            ValueError: `name` is none that this store gives.
        """
        if name is not None and not (is_name(name) and name.endswith(f".{extension}")):
            raise ValueError(f"{name!r} is no name of a picture with the extension {extension!r}")
        name = name or new_name(extension)
        if name in self._pictures:
            self._held_bytes -= self._pictures.pop(name)[1].size_bytes
        size = data.nbytes if isinstance(data, memoryview) else len(data)
        if size > self._max_bytes:
            self._counts = replace(self._counts, failures=self._counts.failures + 1)
            raise StorageFailed(
                f"a picture of {size} bytes could not be stored: memory for pictures is {self._max_bytes}"
            )
        while self._held_bytes + size > self._max_bytes:
            self._drop(next(iter(self._pictures)))
        stored = StoredArtifact(name, media_type_of(name), size, self._clock())
        self._pictures[name] = bytes(data), stored
        self._held_bytes += size
        self._counts = replace(self._counts, stored=self._counts.stored + 1, bytes=self._counts.bytes + size)
        return stored

    async def find(self, name: str) -> StoredArtifact | None:
        """The picture's record; None if unknown, expired or not a name that this store gives."""
        found = self._pictures.get(name)
        return None if found is None or self._is_expired(found[1]) else found[1]

    async def read(self, name: str, start: int, stop: int) -> AsyncIterator[bytes]:
        """Bytes `start` (inclusive) to `stop` (exclusive) in chunks of at most 1 MiB.

        Raises:
            NotFound: there is no such picture (any more).
            StorageFailed: it ends before `stop`.
        """
        found = self._pictures.get(name)
        if found is None:
            raise NotFound(f"the picture {name} is gone" if is_name(name) else "there is no such picture")
        data = found[0]
        while start < stop:
            chunk = data[start : min(start + CHUNK_BYTES, stop)]
            if not chunk:
                raise StorageFailed(f"the picture {name} ends before byte {stop}")
            start += len(chunk)
            yield chunk

    async def delete(self, name: str) -> bool:
        """Remove a picture; whether it was there."""
        if name not in self._pictures:
            return False
        self._held_bytes -= self._pictures.pop(name)[1].size_bytes
        return True

    async def names(self) -> list[str]:
        """The names of all pictures, expired ones too."""
        return list(self._pictures)

    async def sweep(self) -> int:
        """Remove what is expired; room is made when a picture comes, so nothing is ever over the limit."""
        expired = [name for name, (_, stored) in self._pictures.items() if self._is_expired(stored)]
        for name in expired:
            self._drop(name)
        return len(expired)

    def path_of(self, name: str) -> str:
        """There is none.

        Raises:
            NotFound: always: a picture in memory has no path.
        """
        raise NotFound(f"the picture {name} is kept in memory: it has no path" if is_name(name) else "no such picture")

    def snapshot(self) -> StoreSnapshot:
        """What it did so far."""
        return self._counts

    def close(self) -> None:
        """Forget everything."""
        self._pictures.clear()
        self._held_bytes = 0

    def _is_expired(self, stored: StoredArtifact) -> bool:
        return self._ttl_seconds is not None and self._clock() - stored.modified_at >= self._ttl_seconds

    def _drop(self, name: str) -> None:
        _, stored = self._pictures.pop(name)
        self._held_bytes -= stored.size_bytes
        self._counts = replace(self._counts, swept=self._counts.swept + 1)

    def __repr__(self) -> str:
        return f"<MemoryStore {len(self._pictures)} pictures, {self._held_bytes}/{self._max_bytes} bytes>"
