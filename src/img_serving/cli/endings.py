"""How a command ends: its exit codes, the one error that carries a message, and how text from elsewhere is shown."""

from __future__ import annotations

import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Final

OK: Final = 0
FAILED: Final = 1
MISUSED: Final = 2
"""Wrong usage, or a configuration that cannot be used."""
INTERRUPTED: Final = 130


class CommandFailed(Exception):
    """The command cannot do what it was asked to; the message says why and what to do, and holds no secret."""

    def __init__(self, message: str, exit_code: int = FAILED) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def say(message: str) -> None:
    """One message to people, on standard error."""
    with suppress(OSError):  # nobody listens: the exit code still tells
        print(printable(message), file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """`text` with what could command a terminal made visible; lines stay lines."""
    return "".join(char if char.isprintable() or char == "\n" else ascii(char)[1:-1] for char in text)


def moment(seconds: float | None) -> str:
    """A moment of Unix seconds in UTC; `-` for none."""
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return "?"
