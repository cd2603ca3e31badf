"""The moves between base64 text and picture bytes: an artifact holds one of the two, proven valid, and never both."""

from __future__ import annotations

import binascii

import pybase64

from img_serving.domain.images import Artifact
from img_serving.media.sniff import check_picture

_PREFIX_LIMIT = 256
"""Bytes within which the header of a `data:` URL must end."""

_URL_SAFE = frozenset(b"-_")
_STANDARD_ONLY = frozenset(b"+/")
_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_WHITESPACE = b" \t\r\n\f\v"


def artifact_from_base64(
    text: bytes | memoryview | str, seed: int | None = None, revised_prompt: str | None = None
) -> Artifact:
    """A picture that came as base64, or as a `data:` URL.

    It is decoded once to prove it, and the decoded bytes are dropped: `encoded` is the given text itself (a view keeps what
    it looks into alive). Text that is not canonical (line breaks, the URL-safe alphabet, padding left out) is not good
    enough to hand on, so then `data` has the bytes instead.

    Raises:
        ValueError: "bad base64: …", "not a picture: …" or "cut short: …".
    """
    if isinstance(text, str):
        try:
            text = text.encode("ascii")
        except UnicodeEncodeError:
            raise ValueError("bad base64: it is not ASCII") from None
    text = _without_prefix(text)
    data, canonical = _decoded(text)
    media_type, width, height = check_picture(data)
    return Artifact(
        media_type=media_type,
        width=width,
        height=height,
        seed=seed,
        data=None if canonical else data,
        encoded=text if canonical else None,
        revised_prompt=revised_prompt,
    )


def decoded_base64(text: str) -> bytes:
    """The bytes in base64, or in a `data:` URL, whatever they are.

    Raises:
        ValueError: "bad base64: …", or it is empty.
    """
    try:
        raw = text.encode("ascii")
    except UnicodeEncodeError:
        raise ValueError("bad base64: it is not ASCII") from None
    return _decoded(_without_prefix(raw))[0]


def artifact_from_bytes(
    data: bytes | bytearray | memoryview, seed: int | None = None, revised_prompt: str | None = None
) -> Artifact:
    """A picture that came as bytes; anything but `bytes` is copied.

    Raises:
        ValueError: "not a picture: …" or "cut short: …".
    """
    media_type, width, height = check_picture(data)
    return Artifact(
        media_type=media_type,
        width=width,
        height=height,
        seed=seed,
        data=data if isinstance(data, bytes) else bytes(data),
        revised_prompt=revised_prompt,
    )


def raw_bytes(artifact: Artifact) -> bytes:
    """The picture itself: what is there, or decoded from what is there."""
    if artifact.data is not None:
        return artifact.data
    if artifact.encoded is None:
        raise ValueError("the artifact has no picture")
    return pybase64.b64decode(artifact.encoded, validate=True)


def base64_text(artifact: Artifact) -> bytes | memoryview:
    """The picture as standard base64, without line breaks or prefix: what is there, or encoded from what is there."""
    if artifact.encoded is not None:
        return artifact.encoded
    if artifact.data is None:
        raise ValueError("the artifact has no picture")
    return pybase64.b64encode(artifact.data)


def _without_prefix(text: bytes | memoryview) -> bytes | memoryview:
    """What stands behind `data:…;base64,`: a view, so that nothing is copied."""
    if not text or text[0] not in b"dD":
        return text  # most come without one
    head = bytes(text[:_PREFIX_LIMIT])
    if head[:5].lower() != b"data:":
        return text
    comma = head.find(b",")
    if comma < 0 or not head[:comma].lower().endswith(b";base64"):
        raise ValueError("bad base64: the data URL is of another kind")
    return memoryview(text)[comma + 1 :]


def _decoded(text: bytes | memoryview) -> tuple[bytes, bool]:
    """What is in base64, and whether the text is canonical. Raises ValueError."""
    if not text:
        raise ValueError("not a picture: it is empty")
    try:
        return pybase64.b64decode(text, validate=True), True
    except binascii.Error:
        return _decode_leniently(text), False


def _decode_leniently(text: bytes | memoryview) -> bytes:
    """Decode what has only one meaning, though it is not canonical.

    Raises:
        ValueError: it has none, or more than one (both alphabets at once).
    """
    letters = bytes(text).translate(None, _WHITESPACE).rstrip(b"=")
    if len(letters) % 4 == 1:
        raise ValueError("bad base64: it ends in the middle of a byte")
    # `in` on bytes is one memchr each: a set of 2 MB would not be
    if any(letter in letters for letter in _URL_SAFE):
        if any(letter in letters for letter in _STANDARD_ONLY):
            raise ValueError("bad base64: two alphabets at once")
        letters = letters.translate(_TO_STANDARD)
    try:
        return pybase64.b64decode(letters + b"=" * (-len(letters) % 4), validate=True)
    except binascii.Error:
        raise ValueError("bad base64: it has characters that do not belong there") from None
