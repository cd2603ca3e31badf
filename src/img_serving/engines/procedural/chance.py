"""Chance: every random number of a picture has a name, and the name alone (through BLAKE2b) says what it is."""

from __future__ import annotations

from hashlib import blake2b


def key_of(*parts: object) -> bytes:
    """A stable 16-byte name for a stream of random numbers."""
    return blake2b("\0".join(map(str, parts)).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def chance(*parts: object) -> float:
    """A random number in [0, 1) that belongs to these parts: named draws do not depend on the order of drawing."""
    return int.from_bytes(key_of(*parts)[:6], "little") / 2**48
