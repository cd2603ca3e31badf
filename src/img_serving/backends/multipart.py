"""`multipart/form-data` bodies (RFC 7578): fields and files, written so that neither a name nor a content can break out."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import quote

_SAFE_IN_NAME = " !#$&'()*+,-./:;<=>?@[]^_`{|}~"
"""Everything printable but the quote, the backslash and the percent sign itself."""


@dataclass(frozen=True, slots=True)
class FilePart:
    """One file of a form. `data` is not looked at."""

    name: str
    filename: str
    media_type: str
    data: bytes


def encode_form(fields: Iterable[tuple[str, str]], files: Iterable[FilePart]) -> tuple[bytes, str]:
    """The body, and its Content-Type with the boundary; scalars come first, as most servers expect them.

    The boundary has 128 random bits: nobody can write one that he has not seen into a prompt or a picture.
    """
    boundary = f"img-serving-{secrets.token_hex(16)}"
    parts: list[bytes] = []
    for name, value in fields:
        parts += _head(boundary, f'name="{_quoted(name)}"'), value.encode(), b"\r\n"
    for file in files:
        disposition = f'name="{_quoted(file.name)}"; filename="{_quoted(file.filename)}"'
        parts += _head(boundary, disposition, file.media_type), file.data, b"\r\n"
    parts.append(f"--{boundary}--\r\n".encode())
    return b"".join(parts), f"multipart/form-data; boundary={boundary}"


def _head(boundary: str, disposition: str, media_type: str | None = None) -> bytes:
    kind = f"Content-Type: {media_type}\r\n" if media_type else ""
    return f"--{boundary}\r\nContent-Disposition: form-data; {disposition}\r\n{kind}\r\n".encode()


def _quoted(name: str) -> str:
    """As browsers do (WHATWG HTML, 4.10.21.8): what could end the parameter or its line is percent-encoded."""
    return quote(name, safe=_SAFE_IN_NAME)
