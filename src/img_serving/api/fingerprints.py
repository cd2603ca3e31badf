"""When two requests are the same: a digest of what they say, whatever the order of their keys and their white space."""

from __future__ import annotations

import hashlib

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
