"""Multipart forms as clients send them: text fields, files, and nothing believed of what a part says of itself."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from img_serving.domain.errors import InvalidRequest

MAX_PARTS = 64
MAX_FIELD_BYTES = 1024 * 1024
_NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,128}")


@dataclass(slots=True)
class Form:
    """The parts of a form: text fields by name (the last of a name stands), and files by name, in their order."""

    fields: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)


class _Collector:
    """Gathers parts from the parser's callbacks. Raises InvalidRequest for what is too much, or no part of a form."""

    def __init__(self, body: bytes) -> None:
        self.form = Form()
        self._body = body
        self._name = ""
        self._is_file = False
        self._pieces: list[bytes] = []
        self._size = 0
        self._parts = 0
        self._header: list[bytes] = [b"", b""]
        self._disposition = b""

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > MAX_PARTS:
            raise InvalidRequest(f"the form has more than {MAX_PARTS} parts", code="invalid_multipart")
        self._pieces, self._size, self._disposition = [], 0, b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header[0] += data[start:end]

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1] += data[start:end]

    def on_header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = self._header[1]
        self._header = [b"", b""]

    def on_headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not _NAME.fullmatch(name):
            raise InvalidRequest(
                "a part of the form has no usable name: each needs Content-Disposition: form-data; name=…",
                code="invalid_multipart",
            )
        self._name = name
        self._is_file = b"filename" in options

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._size += end - start
        if not self._is_file and self._size > MAX_FIELD_BYTES:
            raise InvalidRequest(
                f"the field is over {MAX_FIELD_BYTES} bytes", code="invalid_multipart", param=self._name
            )
        self._pieces.append(data[start:end])

    def on_part_end(self) -> None:
        content = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces = []
        if self._is_file:
            self.form.files.setdefault(self._name, []).append(content)
            return
        try:
            self.form.fields[self._name] = content.decode()
        except UnicodeDecodeError:
            raise InvalidRequest("the field is not UTF-8 text", code="invalid_multipart", param=self._name) from None


def read_form(body: bytes, content_type: bytes) -> Form:
    """Take a form apart.

    Raises:
        InvalidRequest: it is malformed, cut short, or has too many or too large parts.
    """
    kind, options = parse_options_header(content_type)
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or not 0 < len(boundary) <= 200:
        raise InvalidRequest("the Content-Type of a form needs its boundary", code="invalid_multipart")
    collector = _Collector(body)
    parser = MultipartParser(
        boundary,
        {
            "on_part_begin": collector.on_part_begin,
            "on_part_data": collector.on_part_data,
            "on_part_end": collector.on_part_end,
            "on_header_field": collector.on_header_field,
            "on_header_value": collector.on_header_value,
            "on_header_end": collector.on_header_end,
            "on_headers_finished": collector.on_headers_finished,
        },
    )
    try:
        parser.write(body)
        parser.finalize()
    except MultipartParseError as error:
        raise InvalidRequest(f"the form is malformed: {error}", code="invalid_multipart") from None
    if not body.rstrip(b"\r\n").endswith(b"--" + boundary + b"--"):
        raise InvalidRequest("the form is cut short: its closing boundary is missing", code="invalid_multipart")
    return collector.form
