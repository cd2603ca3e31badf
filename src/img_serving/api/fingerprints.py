"""When two requests are the same: a digest of what they say, whatever the order of their fields and their white space."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import msgspec

_decode = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder(order="sorted").encode


def fingerprint_of_json(operation: str, raw: bytes) -> bytes:
    """32 bytes that are equal for equal JSON bodies of one operation. A body that is none is taken as it is."""
    try:
        canonical = _encode(_decode(raw))
    except (ValueError, RecursionError):
        canonical = raw
    return hashlib.sha256(operation.encode() + b"\0" + canonical).digest()


def fingerprint_of_pictures(operation: str, said: bytes, images: Sequence[bytes], mask: bytes | None) -> bytes:
    """32 bytes of a request that starts from pictures: what else it says, in a canonical form, and the pictures in order."""
    whole = hashlib.sha256(operation.encode() + b"\0" + hashlib.sha256(said).digest())
    for image in images:
        whole.update(b"image" + hashlib.sha256(image).digest())
    if mask is not None:
        whole.update(b"mask" + hashlib.sha256(mask).digest())
    return whole.digest()
