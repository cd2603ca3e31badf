"""Server-sent events, without I/O: bytes go in as they come, events come out as they end, and none may be without end."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE_END = re.compile(rb"\r\n|\r|\n")
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Event:
    """One event: `name` is "" where the stream gave none, `data` the lines of its data joined by line feeds."""

    name: str
    data: bytes


class EventReader:
    """Reads one `text/event-stream` by WHATWG's rules (HTML, 9.2.6), but for one: a last event without its blank line counts.

    Real servers leave that line out, and clients that follow the rule to the letter lose the picture that was paid for.
    `last_id` is what to send as `Last-Event-ID` after a cut: that of the last event that came whole, "" for none.
    """

    def __init__(self, limit_bytes: int) -> None:
        """`limit_bytes` bounds what is held at once: the data of one event, or one line."""
        self._limit_bytes = limit_bytes
        self._line = bytearray()
        self._name = ""
        self._data = bytearray()
        self._id = ""
        self.last_id = ""
        self._at_start = True
        self._after_cr = False

    def feed(self, piece: bytes) -> list[Event]:
        """The events that `piece` completes.

        Raises:
            ValueError: an event is over the limit; nothing more can be read then.
        """
        if self._after_cr and piece:
            self._after_cr = False
            if piece.startswith(b"\n"):  # the second half of a CRLF
                piece = piece[1:]
        if not piece:
            return []
        # most pieces of a picture hold no line end, and two memchr are cheaper than the pattern
        if b"\n" not in piece and b"\r" not in piece:
            self._line += piece
            self._check_size()
            return []
        self._after_cr = piece.endswith(b"\r")
        first, *lines, rest = _LINE_END.split(piece)
        self._line += first
        events = self._take(bytes(self._line))
        for line in lines:
            events += self._take(line)
        self._line = bytearray(rest)
        self._check_size()
        return events

    def finish(self) -> list[Event]:
        """The event that the end of the stream completes, if there is one."""
        line, self._line = bytes(self._line), bytearray()
        events = self._take(line) if line else []
        return events + self._take(b"")

    def _check_size(self) -> None:
        if len(self._line) + len(self._data) > self._limit_bytes:
            raise ValueError(f"an event is over {self._limit_bytes} bytes")

    def _take(self, line: bytes) -> list[Event]:
        """Read one whole line; an empty one ends an event, which counts if it has data."""
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if line:
            field, _, value = line.partition(b":")
            value = value.removeprefix(b" ")
            if field == b"data":
                self._data += value
                self._data += b"\n"
            elif field == b"event":
                self._name = value.decode("utf-8", "replace")
            elif field == b"id" and b"\0" not in value:
                self._id = value.decode("utf-8", "replace")
            return []
        self.last_id = self._id
        name, data = self._name, bytes(self._data[:-1])
        self._name, self._data = "", bytearray()
        return [Event(name, data)] if data else []
