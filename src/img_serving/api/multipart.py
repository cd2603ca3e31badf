"""Multipart forms as clients send them: text fields, files, and nothing believed of what a part says of itself.

Read here and not by a library: those that were tried look at every byte in Python, and one body of 62 MiB of blanks behind a
boundary held a process for thirteen seconds. A form that is in memory already is taken apart by searching (RFC 2046, 5.1.1).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import unquote

from img_serving.domain.errors import InvalidRequest

MAX_PARTS = 64
MAX_FIELD_BYTES = 1024 * 1024
MAX_HEAD_BYTES = 8 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,128}")
_BOUNDARY = re.compile(r"[0-9A-Za-z'()+_,\-./:=? ]{0,199}[0-9A-Za-z'()+_,\-./:=?]")
_PARAMETER = re.compile(r'\s*+(?:([^;=\s"]++)\s*+=\s*+(?:"([^"\\]*+(?:\\.[^"\\]*+)*+)"|([^;]*+)))?+[^;]*+(?:;|\Z)')
"""`name=token;` or `name="quoted";`, or anything else up to a semicolon; what stands behind a closing quote is nobody's."""

_ESCAPED = re.compile(r"\\(.)")


@dataclass(slots=True)
class Form:
    """The parts of a form: text fields by name (the last of a name stands), and files by name, in their order."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


def read_form(body: bytes, content_type: bytes) -> Form:
    """Take a form apart.

    Raises:
        InvalidRequest: it is malformed, cut short, or has too many or too large parts.
    """
    boundary = _parameters(content_type).get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise InvalidRequest("the Content-Type of a form needs its boundary", code="invalid_multipart")
    # what stands before the first delimiter is a preamble, and the first one may stand at the very beginning
    delimiter = re.compile(rb"(?:\A|\r\n)--" + re.escape(boundary.encode()) + rb"(--|[ \t]{0,64}\r\n)")
    form = Form()
    start, count = -1, 0
    for found in delimiter.finditer(body):
        if start >= 0:
            _take(form, body, start, found.start())
        elif found.start() and found.group(1) == b"--":
            break
        if found.group(1) == b"--":
            return form
        start, count = found.end() - 2, count + 1  # the line break may open the next delimiter: a part can be empty
        if count > MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts", code="invalid_multipart")
    if start < 0:
        raise InvalidRequest("the form is malformed: its boundary is not in it", code="invalid_multipart")
    raise InvalidRequest("the form is cut short: its closing boundary is missing", code="invalid_multipart")


def _take(form: Form, body: bytes, start: int, stop: int) -> None:
    """One part, from the line break behind its delimiter to the one before the next."""
    end = body.find(b"\r\n\r\n", start, min(stop, start + MAX_HEAD_BYTES))
    if end < 0:
        raise InvalidRequest("a part of the form has no end of its head", code="invalid_multipart")
    disposition = b""
    for line in body[start:end].split(b"\r\n"):
        key, _, value = line.partition(b":")
        if key.strip().lower() == b"content-disposition":
            disposition = value
    told = _parameters(disposition)
    name = told.get("name", "")
    if told.get("") != "form-data" or not _NAME.fullmatch(name):
        raise InvalidRequest(
            "a part of the form has no usable name: each needs Content-Disposition: form-data; name=…",
            code="invalid_multipart",
        )
    begin = end + 4
    if "filename" in told:
        form.files.setdefault(name, []).append(body[begin:stop])
        return
    if stop - begin > MAX_FIELD_BYTES:
        raise InvalidRequest(f"the field is over {MAX_FIELD_BYTES} bytes", code="invalid_multipart", param=name)
    try:
        form.fields[name] = body[begin:stop].decode()
    except UnicodeDecodeError:
        raise InvalidRequest("the field is not UTF-8 text", code="invalid_multipart", param=name) from None


def _parameters(header: bytes) -> dict[str, str]:
    """A header's value ("") and its parameters, in lower-case names; the first of a name stands, unreadable ones are left out.

    Each character is looked at once, or twice behind a quote that nothing closes. Python's own reader takes seconds for a
    header of semicolons, and raises nearly anything for what RFC 2231 lets a parameter say of its encoding.
    """
    text = header.decode("latin-1").replace("\r", " ").replace("\n", " ")
    value, _, rest = text.partition(";")
    found = {"": value.strip().lower()}
    for one in _PARAMETER.finditer(
        rest
    ):  # they follow each other without a gap: there is nothing that it does not match
        if one.group(1) is None:
            continue
        name, quoted, plain = one.group(1).lower(), one.group(2), one.group(3)
        told: str | None = _ESCAPED.sub(r"\1", quoted) if quoted is not None else plain.strip()
        if name.endswith("*"):
            name, told = name[:-1], _extended(told or "")
        if told is not None:
            found.setdefault(name, told)
    return found


def _extended(value: str) -> str | None:
    """The text of `UTF-8'en'%e2%82%ac` (RFC 8187, 3.2); None where it cannot be read."""
    charset, _, rest = value.partition("'")
    _, mark, encoded = rest.partition("'")
    if not mark or charset.lower() not in {"utf-8", "iso-8859-1"}:
        return None
    try:
        return unquote(encoded, charset, "strict")
    except UnicodeDecodeError:
        return None
