"""Logs: one structured line a request, hand-buffered, and everything else through the standard library's logging.

The request line is off the usual logging path because that costs 20 to 50 µs a line; this costs about three.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import lru_cache
from typing import IO, Literal

import msgspec

FLUSH_BYTES = 32 * 1024
FLUSH_SECONDS = 0.5

_encode = msgspec.json.Encoder().encode


@lru_cache(maxsize=4)
def _to_the_second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def timestamp(seconds: float) -> str:
    """RFC 3339 in UTC with milliseconds, from Unix seconds."""
    whole = int(seconds)
    return f"{_to_the_second(whole)}.{int((seconds - whole) * 1000):03d}Z"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, event, and what the call put into `extra["fields"]`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        entry: dict[str, object] = {
            "ts": timestamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            entry.update(fields)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return _encode(entry).decode()


class ConsoleFormatter(logging.Formatter):
    """For people: time, level, text, fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():<7} {record.getMessage()}"
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict) and fields:
            line += "  " + " ".join(f"{key}={value}" for key, value in fields.items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


def choose_format(configured: Literal["console", "json"] | None, stream: IO[str]) -> Literal["console", "json"]:
    """The configured format, else console on a terminal and JSON elsewhere."""
    if configured is not None:
        return configured
    return "console" if stream.isatty() else "json"


def set_up(level: str, chosen: Literal["console", "json"], stream: IO[str] | None = None) -> None:
    """Route every logger to one stream (standard error) in the chosen format."""
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(ConsoleFormatter() if chosen == "console" else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Pillow warns of what it forgives in a client's picture: as it is, that would be two lines of text among the JSON
    logging.captureWarnings(True)
    # these repeat what the request line says
    for noisy in ("uvicorn.access", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(max(logging.WARNING, root.level))


class RequestLog:
    """Writes one line a request to a file descriptor, in blocks: at 32 KiB, after half a second, and at the end."""

    def __init__(self, fd: int, chosen: Literal["console", "json"], *, enabled: bool = True) -> None:
        """`enabled` False (level above info) drops every line."""
        self._fd = fd
        self._json = chosen == "json"
        self.enabled = enabled
        self._lines: list[bytes] = []
        self._size = 0
        self._timer: asyncio.TimerHandle | None = None

    def write(self, fields: Mapping[str, object]) -> None:
        """Buffer one line. `fields` must hold no secret."""
        if not self.enabled:
            return
        line = _encode(fields) if self._json else _console_line(fields)
        self._lines.append(line)
        self._size += len(line)
        if self._size >= FLUSH_BYTES:
            self.flush()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)

    def flush(self) -> None:
        """Write what is buffered. A log that cannot be written never breaks a request."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._lines:
            return
        self._lines.append(b"")
        block = memoryview(b"\n".join(self._lines))
        self._lines = []
        self._size = 0
        try:
            while block:
                block = block[os.write(self._fd, block) :]
        except OSError:
            return


def _console_line(fields: Mapping[str, object]) -> bytes:
    clock = time.strftime("%H:%M:%S")
    skip = {"ts", "level", "event", "method", "path", "status"}
    rest = " ".join(
        f"{key}={_on_one_line(value)}" for key, value in fields.items() if key not in skip and value not in (None, "")
    )
    return f"{clock} info    {fields.get('method')} {fields.get('path')} → {fields.get('status')}  {rest}".encode()


def _on_one_line(value: object) -> str:
    """A value as it may stand on a terminal: what a client sent must not forge lines or move the cursor."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
