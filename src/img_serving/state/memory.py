"""State that lives as long as the process: for tests and for drawing without a server."""

from __future__ import annotations

from img_serving.state.sqlite import StateError


class MemoryState:
    """The contract of a state store without the disk."""

    def __init__(self) -> None:
        """Starts empty."""
        self._backends: dict[str, bytes] = {}
        self._values: dict[str, str] = {}
        self._closed = False

    async def open(self) -> None:
        """Nothing to open."""
        self._check()

    async def backends(self) -> list[bytes]:
        """The stored backend records (JSON), oldest first."""
        self._check()
        return list(self._backends.values())

    async def put_backend(self, name: str, record: bytes) -> None:
        """Add or replace one; it keeps its place."""
        self._check()
        self._backends[name] = bytes(record)

    async def delete_backend(self, name: str) -> None:
        """Remove one; unknown names are fine."""
        self._check()
        self._backends.pop(name, None)

    async def get_value(self, key: str) -> str | None:
        """A small named value."""
        self._check()
        return self._values.get(key)

    async def put_value(self, key: str, value: str) -> None:
        """Set a small named value."""
        self._check()
        self._values[key] = value

    async def close(self) -> None:
        """No more calls. Closing twice is fine."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise StateError("the state is closed: the gateway is stopping")

    def __repr__(self) -> str:
        return f"<MemoryState {len(self._backends)} backends, {len(self._values)} values>"
