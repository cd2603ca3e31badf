"""Sees to it that one backend is in the gateway's list, for as long as this program runs: a compose profile's way to join.

    python keep_backend.py '{"name": "worker", "protocol": "grpc", "endpoints": ["grpc://worker:50051"]}'
    python keep_backend.py --remove worker

The argument is what `POST /v1/backends` takes. It is added once the gateway answers, and again should it vanish. Stopping this
program leaves it in the list: were it taken out whenever everything is stopped, jobs that wait for it would be drawn by another
backend after the next start. `--remove` takes it out, once. A backend of that name which is there already, at the same
address, is left alone, as is one that the gateway's own configuration defines. Needs Python's own library only. Environment:

    IMG_SERVING_URL        the gateway (http://gateway:8080)
    IMG_SERVING_KEY_FILE   where the gateway keeps its admin key (/app/data/admin.env)
    IMG_SERVING_API_KEY    an admin key, where there is no such file
    BACKEND_API_KEY        sent upstream as the backend's `api_key`, where it is set
    KEPT_FILE              exists while the backend is in the list: for a health check (/tmp/kept)
    LOOK_SECONDS           between two looks at the list (15)
"""
# ruff: noqa: INP001, T201 - a program of one file, which tells a container's log what it does

from __future__ import annotations

import json
import os
import signal
import sys
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote

KEY_NAME = "IMG_SERVING_API_KEY"
TIMEOUT_SECONDS = 10.0
IMPATIENT_SECONDS = 1.0
"""Between two looks while the backend is not in the list yet."""


class Refused(Exception):
    """The gateway said no, or nothing."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Gateway:
    """The admin side of one gateway."""

    def __init__(self, url: str, key_file: Path, key: str | None) -> None:
        self._base = url.rstrip("/") + "/v1/backends"
        self._key_file = key_file
        self._key = key
        self._keyless = ""
        """Why the file gave no key."""

    def find(self, name: str) -> dict[str, Any] | None:
        """The record of a backend; None: there is none.

        Raises:
            Refused: there is no answer, or the key is not taken.
        """
        try:
            return self._call("GET", f"/{quote(name, safe='')}")
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def add(self, backend: dict[str, Any]) -> dict[str, Any]:
        """Add a backend; its record.

        Raises:
            Refused: there is no answer, or the gateway does not take it.
        """
        return self._call("POST", "", backend)

    def remove(self, name: str) -> None:
        """Remove a backend.

        Raises:
            Refused: there is no answer, or it cannot be removed.
        """
        self._call("DELETE", f"/{quote(name, safe='')}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json"}
        if key := self._current_key():
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, content, headers, method=method)  # noqa: S310 - the operator's URL
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as reply:  # noqa: S310 - as above
                return dict(json.load(reply))
        except urllib.error.HTTPError as error:
            with error:
                why = f" ({self._keyless})" if error.code in {401, 403} and self._keyless else ""
                raise Refused(error.code, f"{error.code} {_message_in(error.read())}{why}") from None
        except (OSError, ValueError) as error:
            raise Refused(0, f"no answer from {self._base} ({error})") from error

    def _current_key(self) -> str | None:
        """Read at every call: the gateway may make the file after us."""
        try:
            for line in self._key_file.read_text().splitlines():
                name, _, value = line.partition("=")
                if name == KEY_NAME and value:
                    self._keyless = ""
                    return value
            self._keyless = f"there is no {KEY_NAME} in {self._key_file}"
        except OSError as error:
            self._keyless = f"{self._key_file} cannot be read: {error.strerror}"
        return self._key


class Keeper:
    """One backend, and where it is kept."""

    def __init__(self, gateway: Gateway, backend: dict[str, Any], kept_file: Path) -> None:
        self._gateway = gateway
        self._backend = backend
        self._name: str = backend["name"]
        self._kept_file = kept_file
        self._said = ""

    def look(self) -> bool:
        """See that the backend is in the list; whether it is."""
        try:
            record = self._gateway.find(self._name)
            if record is not None and record["origin"] == "api" and not self._is_at_our_address(record):
                self._gateway.remove(self._name)
                record = None
            if record is None:
                record = self._gateway.add(self._backend)
        except Refused as refused:
            self._kept_file.unlink(missing_ok=True)
            self._say(f"not in the gateway's list yet: {refused}")
            return False
        self._kept_file.touch()
        whose = "" if record["origin"] == "api" else ", as the gateway's own configuration says"
        self._say(f"in the gateway's list: {record['protocol']} at {', '.join(_addresses_of(record))}{whose}")
        return True

    def _is_at_our_address(self, record: dict[str, Any]) -> bool:
        return record["protocol"] == self._backend.get("protocol") and _addresses_of(record) == _addresses_of(
            self._backend
        )

    def _say(self, what: str) -> None:
        """Say news, once."""
        if what != self._said:
            print(f"backend {self._name}: {what}", flush=True)
            self._said = what


def _addresses_of(backend: dict[str, Any]) -> list[str]:
    """Of a record, or of what the API is told."""
    return [one if isinstance(one, str) else str(one.get("url")) for one in backend.get("endpoints", [])]


def _message_in(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode("utf-8", "replace")


def _backend_of(arguments: list[str]) -> dict[str, Any] | None:
    """What the one argument says; None: nothing that could be a backend."""
    try:
        (told,) = arguments
        backend = json.loads(told)
    except ValueError:
        return None
    return backend if isinstance(backend, dict) and isinstance(backend.get("name"), str) else None


def _remove(gateway: Gateway, name: str) -> int:
    try:
        gateway.remove(name)
    except Refused as refused:
        print(f"backend {name}: {refused}", file=sys.stderr)
        return 1
    print(f"backend {name}: taken out of the gateway's list")
    return 0


def main(arguments: list[str]) -> int:
    """Keep the backend until SIGTERM, or remove it; 1: not removed, 2: misused."""
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    asked = os.environ
    gateway = Gateway(
        asked.get("IMG_SERVING_URL") or "http://gateway:8080",
        Path(asked.get("IMG_SERVING_KEY_FILE") or "/app/data/admin.env"),
        asked.get(KEY_NAME),
    )
    if len(arguments) == 2 and arguments[0] == "--remove":
        return _remove(gateway, arguments[1])
    backend = _backend_of(arguments)
    if backend is None:
        print("one argument is needed: the backend, a JSON object with a name", file=sys.stderr)
        return 2
    if token := asked.get("BACKEND_API_KEY"):
        backend["api_key"] = token
    keeper = Keeper(gateway, backend, Path(asked.get("KEPT_FILE") or "/tmp/kept"))  # noqa: S108 - the container's own
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    look_seconds = float(asked.get("LOOK_SECONDS") or 15)
    is_kept = False
    while not stop.wait(look_seconds if is_kept else IMPATIENT_SECONDS):
        is_kept = keeper.look()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
