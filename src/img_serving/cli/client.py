"""Speaks to a running gateway over HTTP, and turns everything that can go wrong there into one clear message."""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import ssl
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec

from img_serving import __version__
from img_serving.cli.endings import MISUSED, CommandFailed
from img_serving.config.addresses import base_of, fault_of_url
from img_serving.config.backend import is_token

URL_VARIABLE: Final = "IMG_SERVING_URL"
KEY_VARIABLE: Final = "IMG_SERVING_API_KEY"
DEFAULT_URL: Final = "http://localhost:8080"
TIMEOUT_SECONDS: Final = 600.0
"""How long the gateway may be silent: the default deadline of its jobs."""
SILENCE_SECONDS: Final = 60.0
"""How long a stream of events may be silent: four of the gateway's signs of life."""
PIECE_BYTES: Final = 64 * 1024


class Unreachable(CommandFailed):
    """There was no answer, or not all of it."""


class Refused(CommandFailed):
    """The gateway, or what stands before it, said no. `code` is the error object's, where it has one."""

    def __init__(self, message: str, status: int, code: Any) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True, slots=True)
class Answer:
    """A successful reply. Header names are in lower case; `seconds` is how long it took."""

    headers: Mapping[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        """The body as JSON values.

        Raises:
            CommandFailed: it is not JSON.
        """
        try:
            return msgspec.json.decode(self.body)
        except (msgspec.DecodeError, RecursionError) as error:
            raise CommandFailed(f"the answer is not JSON ({error}): is there an img-serving gateway?") from error


class Client:
    """One gateway, with the key to call it with."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """`url` with or without a path prefix, a slash at the end or `/v1`.

        Raises:
            CommandFailed: one of them cannot be used.
        """
        url = url if "://" in url else f"http://{url}"
        fault = fault_of_url(url)
        if fault is not None:
            fault = fault.partition(": use the backend's")[0].replace("localhost:7860", "localhost:8080")
            raise CommandFailed(f"the gateway's URL {fault}", MISUSED)
        if api_key is not None and not is_token(api_key):
            raise CommandFailed("the API key has a blank or another character that no header can carry", MISUSED)
        self.url = base_of(url)
        self._api_key = api_key

    def call(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Answer:
        """One request to `path` (percent-encoded, below the gateway's URL); None: as long a silence as a job may take.

        Raises:
            CommandFailed: there is no answer, or it is a refusal.
        """
        headers = {"Accept": "application/json"}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = msgspec.json.encode(body)
        started = time.monotonic()
        with self._asked(method, path, headers, content, timeout_seconds or TIMEOUT_SECONDS) as response:
            received = response.read()
        return Answer(_named(response), received, time.monotonic() - started)

    def listen(self, path: str, last_event_id: str = "") -> Iterator[bytes]:
        """The pieces of the event stream at `path`, as they come; `last_event_id`: behind this event.

        Raises:
            CommandFailed: there is no stream, it is a refusal, or the stream was cut.
        """
        headers = {"Accept": "text/event-stream"}
        if last_event_id:
            headers["Last-Event-ID"] = last_event_id
        with self._asked("GET", path, headers, None, SILENCE_SECONDS) as response:
            if not _named(response).get("content-type", "").startswith("text/event-stream"):
                raise CommandFailed("the answer is not a stream of events: is there an img-serving gateway?")
            while piece := response.read1(PIECE_BYTES):
                yield piece

    @contextmanager
    def _asked(
        self, method: str, path: str, headers: dict[str, str], content: bytes | None, timeout_seconds: float
    ) -> Iterator[http.client.HTTPResponse]:
        """One request and its successful reply, whose body can be read until the block ends.

        Raises:
            Unreachable: there is no answer, or not all of it.
            Refused: it is a refusal.
        """
        parts = urlsplit(self.url)
        headers["User-Agent"] = f"img-serving-cli/{__version__}"
        if self._api_key is not None:
            headers["Authorization"] = f"Bearer {self._api_key}"
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=timeout_seconds)
        try:
            connection.request(method, parts.path + path, content, headers)
            response = connection.getresponse()
            if not 200 <= response.status < 300:
                raise self._refused(response.status, response.reason, _named(response), response.read())
            yield response
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(self._unreachable(error, timeout_seconds)) from error
        finally:
            connection.close()

    def _unreachable(self, error: OSError | http.client.HTTPException, timeout_seconds: float) -> str:
        if isinstance(error, ConnectionRefusedError):
            return (
                f"nothing listens at {self.url}: is the gateway running? "
                "Start it with `make serve` or `img-serving serve`, or name another with --url"
            )
        if isinstance(error, socket.gaierror):
            return f"the host of {self.url} is not known: {error.strerror or error}"
        if isinstance(error, ssl.SSLError):
            return f"no secure connection to {self.url}: {error.reason or error}"
        if isinstance(error, TimeoutError):
            return f"{self.url} did not answer within {timeout_seconds:g} s"
        if isinstance(error, http.client.BadStatusLine | ConnectionError | http.client.IncompleteRead):
            return f"{self.url} closed the connection before its answer was complete: look at the gateway's log"
        if isinstance(error, http.client.HTTPException):
            return f"{self.url} does not answer in HTTP ({type(error).__name__}): is there an img-serving gateway?"
        return f"{self.url} cannot be reached: {error.strerror or error}"

    def _refused(self, status: int, reason: str, headers: Mapping[str, str], body: bytes) -> Refused:
        if 300 <= status < 400 and "location" in headers:
            return Refused(
                f"{self.url} redirects to {headers['location'][:200]}: call that address with --url", status, None
            )
        told = _told(body)
        if told is None:
            message = f"the server answered {status} {reason}: is there an img-serving gateway at {self.url}?"
        else:
            message = told.message[:2000]
        request_id = headers.get("x-request-id")
        message += f" ({status}, request {request_id[:128]})" if request_id else f" ({status})"
        wait = headers.get("retry-after", "")
        if status in {429, 503} and wait.isdigit():
            message += f"; try again in {wait} s"
        return Refused(message + self._hint(status), status, None if told is None else told.code)

    def _hint(self, status: int) -> str:
        if status == 401 and self._api_key is None:
            return f"\nhint: give the key with --api-key, ${KEY_VARIABLE}, or in ./.env (`make serve` puts it there)"
        if status == 401:
            return f"\nhint: the key that was sent (--api-key, ${KEY_VARIABLE} or ./.env, in this order) is not this gateway's"
        if status == 403:
            return "\nhint: use another key; those of the role admin may do everything"
        return ""


def connect(args: argparse.Namespace) -> Client:
    """The gateway that the options, the environment and `.env` name.

    Raises:
        CommandFailed: its URL or its key cannot be used.
    """
    url = args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    return Client(url, args.api_key or os.environ.get(KEY_VARIABLE) or _remembered_key())


def _remembered_key() -> str | None:
    """The key that `make serve` keeps in `.env`."""
    path = Path(".env")
    if not path.exists():
        return None
    from img_serving.state.admin_key import read_env_key

    return read_env_key(path)


def _named(response: http.client.HTTPResponse) -> dict[str, str]:
    """The headers; names in lower case."""
    return {name.lower(): value for name, value in response.getheaders()}


class _Detail(msgspec.Struct):
    message: str
    code: Any = None


class _Refusal(msgspec.Struct):
    error: _Detail


def _told(body: bytes) -> _Detail | None:
    """What an error object says, or None."""
    try:
        return msgspec.json.decode(body, type=_Refusal).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
