"""Scan + skeleton: cuts the megabytes of base64 out of a JSON reply, so that only a few hundred bytes need a JSON parser.

A typed decoder spends most of its time on copying and checking a string of 2 MB that is base64 and nothing else. Here the
strings of a document are walked by `find` (memchr): outside a string a quote always begins one, and inside it only an
unescaped quote ends it, so keys inside prompts deceive nobody. The wanted ones become views, and their places in the skeleton
hold the index of the view as a short string. Everything that is no JSON is still refused, by whoever parses the skeleton.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

Body = bytes | bytearray

STRINGS_LIMIT = 50_000
"""Strings in one document: no reply with pictures has as many, and walking them would hold up the loop."""

SKELETON_BYTES = 4 << 20
"""What a reply may hold besides its pictures: millions of small values would stop the loop for as long as they are read."""

_BACKSLASH = ord("\\")

_ESCAPED_KEY_LIMIT = 6
"""Each character of a key takes at most six bytes (`\\u0062`)."""

_REST_OF_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


def split_images_json(body: Body, key: bytes = b"b64_json") -> tuple[bytes, list[memoryview]]:
    r"""Cut the value of every `"b64_json": "…"` out, at any depth.

    Returns the skeleton, in which each such value is the decimal index of its payload as a string, and the payloads: views
    into `body`, but for those with escapes in them (`\/` is legal), which are unescaped copies.

    Raises:
        ValueError: a string does not end, or an escape in a payload means nothing.
    """
    cutter = _Cutter(body)
    previous, previous_close = (0, 0), 0
    for start, stop in _strings(body):
        gap = _gap(body, previous_close, start - 1)
        if gap == b":" and _is_key(body, previous, key):
            cutter.cut(start, stop)
        previous, previous_close = (start, stop), stop + 1
    return cutter.finish()


def split_string_list_json(body: Body, key: bytes = b"images") -> tuple[bytes, list[memoryview]]:
    """Cut the strings out of every `"images": ["…", "…"]`, at any depth, as `split_images_json` does.

    Of a list that holds other things than strings, only the strings before the first of those are cut: decode it as a list
    of strings, which refuses it.

    Raises:
        ValueError: a string does not end, or an escape in a payload means nothing.
    """
    cutter = _Cutter(body)
    previous, previous_close = (0, 0), 0
    inside = False
    for start, stop in _strings(body):
        gap = _gap(body, previous_close, start - 1)
        inside = gap == b"," if inside else gap == b":[" and _is_key(body, previous, key)
        if inside:
            cutter.cut(start, stop)
        previous, previous_close = (start, stop), stop + 1
    return cutter.finish()


class _Cutter:
    """Collects payloads, and the pieces of the document between them."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self._view = memoryview(body)
        self._pieces: list[bytes | bytearray] = []
        self._payloads: list[memoryview] = []
        self._done = 0

    def cut(self, start: int, stop: int) -> None:
        self._pieces.append(self._body[self._done : start])
        self._pieces.append(b"%d" % len(self._payloads))
        self._done = stop
        payload = self._view[start:stop]
        if self._body.find(b"\\", start, stop) >= 0:
            payload = memoryview(msgspec.json.decode(self._view[start - 1 : stop + 1], type=str).encode())
        self._payloads.append(payload)

    def finish(self) -> tuple[bytes, list[memoryview]]:
        self._pieces.append(self._body[self._done :])
        return b"".join(self._pieces), self._payloads


def _strings(body: Body) -> Iterator[tuple[int, int]]:
    """Where the text of each string begins and where its closing quote stands. Raises ValueError."""
    opening = body.find(b'"')
    for _ in range(STRINGS_LIMIT):
        if opening < 0:
            return
        start = opening + 1
        stop = body.find(b'"', start)
        if stop > start and body[stop - 1] == _BACKSLASH:
            # perhaps escaped: read the escapes from where the string begins (without one before it, a quote is an end)
            rest = _REST_OF_STRING.match(body, start)
            stop = rest.end() if rest and body.startswith(b'"', rest.end()) else -1
        if stop < 0:
            raise ValueError("the JSON ends inside a string")
        yield start, stop
        opening = body.find(b'"', stop + 1)
    raise ValueError(f"the JSON has more than {STRINGS_LIMIT} strings")


def _gap(body: Body, start: int, stop: int) -> bytes:
    """What stands between two strings, without JSON's whitespace."""
    return bytes(body[start:stop]).translate(None, b" \t\r\n")


def _is_key(body: Body, place: tuple[int, int], key: bytes) -> bool:
    start, stop = place
    if stop - start == len(key):
        return body.startswith(key, start)
    if not len(key) < stop - start <= _ESCAPED_KEY_LIMIT * len(key) or body.find(b"\\", start, stop) < 0:
        return False
    try:
        return msgspec.json.decode(memoryview(body)[start - 1 : stop + 1], type=str) == key.decode()
    except ValueError:
        return False
