"""Runs the official client libraries in environments of their own: one process each, one call a line, both ways JSON."""

from __future__ import annotations

import base64
import json
import os
import queue
import subprocess
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CALL_SECONDS = 60.0
PROGRAMS = Path(__file__).parent.parent / "clients"
VARIABLE = "IMG_SERVING_CLIENTS"
"""The folder of environments that `scripts/official-clients` makes: NAME runs a program in one, NAME.missing says why not."""


@dataclass(frozen=True, slots=True)
class Raised:
    """An exception as its user sees it. `classes` are the names of its class and of those above it."""

    classes: tuple[str, ...]
    message: str
    status: int | None
    request_id: str | None
    code: str | None
    param: str | None
    type: str | None


@dataclass(frozen=True, slots=True)
class Attempt:
    """One request of a call: the head of the reply, and those headers sent that tests ask for. `seconds` since the call."""

    status: int
    headers: Mapping[str, str]
    sent: Mapping[str, str | None]
    seconds: float


@dataclass(frozen=True, slots=True)
class Told:
    """What came of a call. `result` is as the library returned it; `events` are a stream's, up to `raised` if it broke."""

    seconds: float
    result: Any = None
    request_id: str | None = None
    events: list[dict[str, Any]] = field(default_factory=list)
    attempts: tuple[Attempt, ...] = ()
    raised: Raised | None = None

    @property
    def error(self) -> Raised:
        """What was raised; a call that raised nothing fails the test."""
        assert self.raised is not None, f"nothing was raised: {self.result or self.events}"
        return self.raised

    @property
    def pictures(self) -> list[dict[str, Any]]:
        """`data` of an image reply; a call that raised fails the test."""
        assert self.raised is None, self.raised
        data: list[dict[str, Any]] = self.result["data"]
        return data

    @property
    def statuses(self) -> list[int]:
        """Those of all attempts."""
        return [one.status for one in self.attempts]


class OfficialClient:
    """One library in one environment; it does one call at a time."""

    def __init__(self, name: str, runner: Path, directory: Path) -> None:
        """`runner` is the environment's interpreter, `name` is "python-3" or the like."""
        self.name = name
        self.language, _, major = name.partition("-")
        self.major = int(major)
        program = {"python": "python/calls.py", "node": "node/calls.mjs"}[self.language]
        hidden = ("OPENAI_", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "PYTHON", "NODE_")
        env = {key: value for key, value in os.environ.items() if not key.upper().startswith(hidden)}
        self._errors = directory / f"{name}.stderr"
        with self._errors.open("w") as stderr:
            self._process = subprocess.Popen(
                [str(runner), str(PROGRAMS / program)],
                env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True,
            )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def __repr__(self) -> str:
        return f"<OfficialClient {self.name}>"

    def call(
        self,
        scenario: str,
        url: str,
        key: str,
        *,
        headers: Mapping[str, str] | None = None,
        extensions: Mapping[str, Any] | None = None,
        options: Mapping[str, Any] | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        **arguments: Any,
    ) -> Told:
        """Make a call and wait for what came of it.

        Args:
            scenario: generate, edit, variation, models, model, get or post.
            url: the base URL, with or without `/v1`.
            key: the API key.
            headers: sent along, as a user would add them.
            extensions: what the library has no argument for.
            options: those of the client: `max_retries`, `timeout` (seconds), `asynchronous` (Python only).
            on_event: told of each event of a stream when the library gave it out.
            arguments: the method's own; see `picture_file` for pictures.
        """
        line = {
            "scenario": scenario, "base_url": url, "api_key": key, "headers": dict(headers or {}),
            "extensions": dict(extensions or {}), "arguments": arguments, **(options or {}),
        }  # fmt: skip
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then it says nothing either
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        events: list[dict[str, Any]] = []
        while "told" not in (said := self._hear(scenario)):
            events.append(said["event"])
            if on_event is not None:
                on_event(said["event"])
        told = said["told"]
        raised = told.pop("raised", None)
        attempts = tuple(Attempt(**one) for one in told.pop("attempts"))
        if raised is not None:
            raised = Raised(**{**raised, "classes": tuple(raised["classes"])})
        return Told(**told, events=events, attempts=attempts, raised=raised)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def _hear(self, scenario: str) -> dict[str, Any]:
        """The next line."""
        try:
            line = self._lines.get(timeout=CALL_SECONDS)
        except queue.Empty:
            self._process.kill()
            raise AssertionError(f"{self.name} says nothing more of {scenario} for {CALL_SECONDS} s") from None
        assert line, f"{self.name} ended: {self._errors.read_text()}"
        said: dict[str, Any] = json.loads(line)
        return said

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")


def need_clients() -> None:
    """Skip the module that is being collected, unless there are environments to run clients in."""
    if VARIABLE not in os.environ:
        reason = "the official client libraries have environments of their own: make test-clients"
        pytest.skip(reason, allow_module_level=True)


def picture_file(data: bytes, name: str | None = "picture.png", media_type: str = "image/png") -> dict[str, str]:
    """A file among the arguments of a call; without a name, Python's library is given the bytes alone."""
    named = {} if name is None else {"name": name, "type": media_type}
    return {"base64": base64.b64encode(data).decode(), **named}
