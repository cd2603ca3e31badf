"""Tells the service manager that started us how we are: systemd's notification protocol (sd_notify(3), `Type=notify`)."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping

log = logging.getLogger(__name__)

_MOST_DIGITS = 18
"""Of `WATCHDOG_USEC`: more are no time that anybody means."""


class ServiceManager:
    """Whoever listens at `$NOTIFY_SOCKET`; without that variable nobody does, and nothing is sent.

    A message is sent at once or not at all, for the event loop sends it. The first of a row that does not get through is
    logged: a gateway serves just as well unheard.
    """

    __slots__ = ("_address", "_is_unheard", "_next_beat", "_watchdog_seconds")

    def __init__(self, environ: Mapping[str, str]) -> None:
        """Take `NOTIFY_SOCKET`, and `WATCHDOG_USEC` unless `WATCHDOG_PID` says that it is meant for another process."""
        name = environ.get("NOTIFY_SOCKET", "")
        # "@" stands for the zero byte that abstract names begin with; nothing else is a Unix socket's address
        self._address = f"\0{name[1:]}" if name.startswith("@") else name if name.startswith("/") else None
        self._watchdog_seconds = _watchdog_seconds(environ) if self._address is not None else None
        self._next_beat = 0.0
        self._is_unheard = False

    def ready(self, status: str) -> None:
        """Connections are accepted. `status` is for people (`systemctl status`)."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """No new work is taken."""
        self._tell("STOPPING=1\nSTATUS=finishes what runs")

    def beat(self, now: float) -> None:
        """The event loop turns: said twice in the time after which the manager would take us for hung. Seconds of one clock."""
        if self._watchdog_seconds is not None and now >= self._next_beat:
            self._next_beat = now + self._watchdog_seconds / 2
            self._tell("WATCHDOG=1")

    def _tell(self, message: str) -> None:
        if self._address is None:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                line.setblocking(False)
                line.sendto(message.encode(), self._address)
            self._is_unheard = False
        except OSError as error:
            if not self._is_unheard:
                log.warning("the service manager does not hear us (%s): %s", message.partition("\n")[0], error)
            self._is_unheard = True


def _watchdog_seconds(environ: Mapping[str, str]) -> float | None:
    microseconds = environ.get("WATCHDOG_USEC", "")
    meant_for = environ.get("WATCHDOG_PID", "")
    is_told = microseconds.isascii() and microseconds.isdecimal() and len(microseconds) <= _MOST_DIGITS
    if not is_told or int(microseconds) == 0 or (meant_for and meant_for != str(os.getpid())):
        return None
    return int(microseconds) / 1_000_000
