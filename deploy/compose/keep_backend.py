"""Sees to it that one backend is in the gateway's list, for as long as this program runs: a compose profile's way to join.

    python keep_backend.py '{"name": "worker", "protocol": "grpc", "endpoints": ["grpc://worker:50051"]}'
    python keep_backend.py --remove worker

The argument is what `POST /v1/backends` takes. It is added once the gateway answers, and again should it vanish. Stopping this
program leaves it in the list: were it taken out whenever everything is stopped, jobs that wait for it would be drawn by another
backend after the next start. `--remove` takes it out, once. A backend of that name which is there already is never replaced:
one at the same address is taken for this one, one at another address is somebody's, and this program says so and waits; one
that the gateway's own configuration defines stands in for it. Needs Python's own library only. Environment:

    IMG_SERVING_URL        the gateway (http://gateway:8080), asked directly: through no proxy, and along no redirect
    IMG_SERVING_KEY_FILE   where the gateway keeps its admin key (/app/data/admin.env)
    IMG_SERVING_API_KEY    an admin key, where there is no such file
    BACKEND_API_KEY        sent upstream as the backend's `api_key`, where it is set
    KEPT_FILE              exists while the backend is in the list: for a health check (/tmp/kept)
    LOOK_SECONDS           between two looks at the list (15)
"""
# ruff: noqa: INP001, T201 - a program of one file, which tells a container's log what it does

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import sys
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import quote, urlsplit

KEY_NAME = "IMG_SERVING_API_KEY"
TIMEOUT_SECONDS = 10.0
IMPATIENT_SECONDS = 1.0
"""Between two looks while the backend is not in the list yet."""
LONGEST_LOOK_SECONDS = 86400.0
LONGEST_REPLY_BYTES = 16 * 2**20
LONGEST_MESSAGE = 500
KEY = re.compile(r"[!-~]+")
"""What a header can hold of a key."""
USERINFO = re.compile(r"//[^/@\s]*@")
DEFAULT_PORTS = {"http": 80, "https": 443}


class Misused(Exception):
    """What the operator has said cannot be right; the message says why, and shows no secret."""


class Refused(Exception):
    """The gateway said no, or nothing, or nothing that makes sense."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """The admin key is for the gateway alone."""

    def redirect_request(self, *_: Any) -> None:
        """Nowhere: the redirect is an error."""


@dataclass(frozen=True)
class Record:
    """What the gateway says of a backend."""

    origin: str
    protocol: str
    addresses: list[str]


class Gateway:
    """The admin side of one gateway."""

    def __init__(self, url: str, key_file: Path, key: str | None) -> None:
        self._base = url.rstrip("/") + "/v1/backends"
        self._key_file = key_file
        self._key = key
        self._keyless = ""
        """Why the file gave no key."""
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)

    def find(self, name: str) -> Record | None:
        """The record of a backend; None: there is none.

        Raises:
            Refused: there is no answer, or the key is not taken.
        """
        try:
            return self._record_in(self._call("GET", f"/{quote(name, safe='')}"))
        except Refused as refused:
            if refused.status == 404:
                return None
            raise

    def add(self, backend: dict[str, Any]) -> Record:
        """Add a backend; its record.

        Raises:
            Refused: there is no answer, or the gateway does not take it.
        """
        return self._record_in(self._call("POST", "", backend))

    def remove(self, name: str) -> None:
        """Remove a backend.

        Raises:
            Refused: there is no answer, or it cannot be removed.
        """
        self._call("DELETE", f"/{quote(name, safe='')}")

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if key := self._current_key():
            headers["Authorization"] = f"Bearer {key}"
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, content, headers, method=method)  # noqa: S310 - the operator's URL
        try:
            with self._opener.open(request, timeout=TIMEOUT_SECONDS) as reply:
                text = reply.read(LONGEST_REPLY_BYTES)
        except urllib.error.HTTPError as error:
            why = f" ({self._keyless})" if error.code in {401, 403} and self._keyless else ""
            raise Refused(error.code, f"{error.code} {_message_of(error)}{why}") from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Refused(0, f"no answer from {self._base} ({_reason_of(error)})") from None
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Refused(0, f"what {self._base} answers is not JSON, or not all of it") from None

    def _record_in(self, told: Any) -> Record:
        if isinstance(told, dict):
            origin, protocol, addresses = told.get("origin"), told.get("protocol"), _addresses_of(told)
            if isinstance(origin, str) and isinstance(protocol, str) and addresses is not None:
                return Record(origin, protocol, addresses)
        raise Refused(0, f"what {self._base} answers is no backend: is this the gateway?")

    def _current_key(self) -> str | None:
        """Read at every call: the gateway may make the file after us."""
        try:
            lines = self._key_file.read_text("utf-8").splitlines()
        except OSError as error:
            self._keyless = f"{self._key_file} cannot be read: {error.strerror}"
        except ValueError:
            self._keyless = f"{self._key_file} is not text"
        else:
            self._keyless = f"there is no {KEY_NAME} in {self._key_file}"
            for line in lines:
                name, _, value = line.partition("=")
                if name.strip() != KEY_NAME or not (key := value.strip()):
                    continue
                if KEY.fullmatch(key):
                    self._keyless = ""
                    return key
                self._keyless = f"{KEY_NAME} in {self._key_file} has characters that no key has"
        return self._key


class Keeper:
    """One backend, and where it is kept."""

    def __init__(self, gateway: Gateway, backend: dict[str, Any], kept_file: Path) -> None:
        self._gateway = gateway
        self._backend = backend
        self._name: str = backend["name"]
        self._addresses = _canonical(_addresses_of(backend) or [])
        """As we say them, and, once we have added it, as the gateway does."""
        self._kept_file = kept_file
        self._said = ""

    def look(self) -> bool:
        """See that the backend is in the list; whether there is nothing to be done until somebody changes that."""
        try:
            record = self._gateway.find(self._name)
            if record is None:
                record = self._gateway.add(self._backend)
                self._addresses = _canonical(record.addresses)
        except Refused as refused:
            self._kept_file.unlink(missing_ok=True)
            self._say(f"not in the gateway's list yet: {refused}")
            return False
        where = f"{record.protocol} at {', '.join(record.addresses)}"
        if record.origin == "api" and not self._is_ours(record):
            self._kept_file.unlink(missing_ok=True)
            self._say(
                f"not in the gateway's list: another one has this name, {where}, and is left alone. "
                f"To have this one instead, take it out: keep_backend.py --remove {self._name}"
            )
            return True
        self._kept_file.touch()
        whose = "" if record.origin == "api" else ", as the gateway's own configuration says"
        self._say(f"in the gateway's list: {where}{whose}")
        return True

    def _is_ours(self, record: Record) -> bool:
        said = self._backend.get("protocol", record.protocol)
        return bool(said == record.protocol and _canonical(record.addresses) == self._addresses)

    def _say(self, what: str) -> None:
        """Say news, once."""
        if what != self._said:
            _tell(f"backend {self._name}: {what}")
            self._said = what


def _tell(what: str, *, is_wrong: bool = False) -> None:
    """One line, whatever is in it, with no name or password of an address."""
    plain = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in USERINFO.sub("//", what))
    print(plain, file=sys.stderr if is_wrong else sys.stdout, flush=True)


def _addresses_of(backend: dict[str, Any]) -> list[str] | None:
    """Of a record, or of what the API is told; None: they are none."""
    told = backend.get("endpoints")
    if not isinstance(told, list):
        return None
    found = [one.get("url") if isinstance(one, dict) else one for one in told]
    addresses = [one for one in found if isinstance(one, str)]
    return addresses if len(addresses) == len(found) else None


def _canonical(addresses: list[str]) -> list[str]:
    """Spelled in one way each, as the gateway takes `HTTP://Host/v1/` and `http://host` for the same address."""
    return [_canonical_one(one) for one in addresses]


def _canonical_one(address: str) -> str:
    try:
        parts = urlsplit(address.strip())
        port = parts.port or DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return address
    path = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    return f"{parts.scheme}://{parts.hostname}:{port}{path}"


def _reason_of(error: Exception) -> str:
    """Why a call failed, in words that hold nothing of what was sent."""
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, http.client.HTTPException):
        return "it speaks no HTTP, or broke off"
    if isinstance(cause, OSError):
        return cause.strerror or str(cause) or type(cause).__name__
    return "the address cannot be used"


def _message_of(error: urllib.error.HTTPError) -> str:
    """What an error's body says, and nothing too long."""
    if error.code in {301, 302, 303, 307, 308}:
        error.close()
        return "the gateway redirects, which is not followed: give its own address"
    body = b""
    try:
        with error:
            body = error.read(LONGEST_REPLY_BYTES)
            return str(json.loads(body)["error"]["message"])[:LONGEST_MESSAGE]
    except (OSError, http.client.HTTPException):
        return "(and broke off)"
    except (ValueError, KeyError, TypeError, RecursionError):
        return body[:200].decode("utf-8", "replace")


def _gateway_of(asked: os._Environ[str]) -> Gateway:
    url = (asked.get("IMG_SERVING_URL") or "http://gateway:8080").strip()
    try:
        parts = urlsplit(url)
        is_usable = parts.scheme in DEFAULT_PORTS and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_usable = False
    if "@" in url:
        raise Misused(
            f"IMG_SERVING_URL has a name or password in it: the gateway takes a key, which goes into {KEY_NAME}"
        )
    if not is_usable or not KEY.fullmatch(url) or "?" in url or "#" in url:
        raise Misused("IMG_SERVING_URL is no address of a gateway, such as http://gateway:8080")
    key = (asked.get(KEY_NAME) or "").strip()
    if key and not KEY.fullmatch(key):
        raise Misused(f"{KEY_NAME} has characters that no key has")
    return Gateway(url, Path(asked.get("IMG_SERVING_KEY_FILE") or "/app/data/admin.env"), key or None)


def _backend_of(arguments: list[str]) -> dict[str, Any]:
    """What the one argument says."""
    try:
        (told,) = arguments
        backend = json.loads(told)
    except (ValueError, RecursionError):
        backend = None
    if not isinstance(backend, dict) or not _is_name(backend.get("name")):
        raise Misused("one argument is needed: the backend, a JSON object with a name")
    return backend


def _is_name(told: object) -> bool:
    return isinstance(told, str) and bool(told.strip()) and told.isprintable()


def _look_seconds_of(asked: os._Environ[str]) -> float:
    try:
        seconds = float(asked.get("LOOK_SECONDS") or 15)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= LONGEST_LOOK_SECONDS:
        raise Misused(f"LOOK_SECONDS is no number of seconds between 0 and {LONGEST_LOOK_SECONDS:.0f}")
    return seconds


def _remove(gateway: Gateway, name: str) -> int:
    if not _is_name(name):
        raise Misused("--remove needs the backend's name")
    try:
        gateway.remove(name)
    except Refused as refused:
        _tell(f"backend {name}: {refused}", is_wrong=True)
        return 1
    _tell(f"backend {name}: taken out of the gateway's list")
    return 0


def _keep(gateway: Gateway, backend: dict[str, Any], look_seconds: float, kept_file: Path) -> None:
    """Until SIGTERM or SIGINT.

    Raises:
        Misused: `kept_file` can be no file.
    """
    stop = Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    keeper = Keeper(gateway, backend, kept_file)
    try:
        kept_file.touch()  # whether it can be, before anything is done
        kept_file.unlink()
        is_settled = False
        while not stop.wait(look_seconds if is_settled else min(look_seconds, IMPATIENT_SECONDS)):
            is_settled = keeper.look()
    except OSError as error:
        raise Misused(f"KEPT_FILE, {kept_file}: {error.strerror}") from None
    finally:  # nobody looks any more
        with suppress(OSError):
            kept_file.unlink()


def main(arguments: list[str]) -> int:
    """Keep the backend until SIGTERM, or remove it; 1: not removed, 2: misused."""
    if arguments in (["-h"], ["--help"]):
        print(__doc__)
        return 0
    asked = os.environ
    try:
        gateway = _gateway_of(asked)
        if len(arguments) == 2 and arguments[0] == "--remove":
            return _remove(gateway, arguments[1])
        backend = _backend_of(arguments)
        if token := (asked.get("BACKEND_API_KEY") or "").strip():
            backend["api_key"] = token
        kept_file = Path(asked.get("KEPT_FILE") or "/tmp/kept")  # noqa: S108 - the container's own
        _keep(gateway, backend, _look_seconds_of(asked), kept_file)
    except Misused as misused:
        _tell(f"keep_backend: {misused}", is_wrong=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
