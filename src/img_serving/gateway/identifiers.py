"""Unguessable identifiers, cheap enough for every request: the system's randomness is asked for in blocks."""

from __future__ import annotations

import os

_BLOCK_BYTES = 4096


class _Source:
    """Hands out each byte of a block once."""

    __slots__ = ("_at", "_block")

    def __init__(self) -> None:
        self._block = b""
        self._at = _BLOCK_BYTES

    def take(self, count: int) -> bytes:
        """`count` random bytes (far fewer than a block)."""
        at = self._at
        if at + count > len(self._block):
            self._block = os.urandom(_BLOCK_BYTES)
            at = 0
        self._at = at + count
        return self._block[at : at + count]


_source = _Source()


def _start_anew() -> None:
    """A child process must not hand out its parent's bytes again."""
    _source.__init__()  # type: ignore[misc]


os.register_at_fork(after_in_child=_start_anew)


def random_bytes(count: int) -> bytes:
    """`count` bytes from the system's generator."""
    return _source.take(count)


def new_id(prefix: str) -> str:
    """`prefix` and 96 random bits in hexadecimal."""
    return prefix + _source.take(12).hex()
