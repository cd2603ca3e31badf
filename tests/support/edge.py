"""The real program with small limits, and what holds for every answer that it gives to whatever it is sent.

A fuzzing test sends bytes over a socket, so that no client library repairs them on their way.
"""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings

from tests.support.programs import Program, serving

FACTOR = int(os.environ.get("FUZZ_FACTOR", "1"))
"""How many times as many examples as in the suite are tried: `make fuzz` says 10, and then they are others every time."""

ADMIN = "sk-fuzz-admin-7Qm2xv9Lr4Tz"
USER = "sk-fuzz-user-3Hn8wk1Yc6Pd"
SECRETS = (
    ADMIN,
    USER,
    "sk-fuzz-upstream-5Bj0se7Ug2Xa",
    "fuzz-header-9Vf4iq8Ol1Mw",
    "fuzz-password-6Dt3zr5Ky0Nh",
    "fuzz-webhooks-secret-2Ce7pb4Jg9Sv",
)
"""What the configuration of the program holds and no answer may."""

UPLOAD_BYTES = 4 << 20
MAX_PIXELS = 512 * 512

CONFIG = f"""
[server]
max_upload_bytes = {UPLOAD_BYTES}
max_body_bytes = 262144
[auth]
api_keys = [{{ name = "admin", key = "{ADMIN}", role = "admin" }}, {{ name = "user", key = "{USER}" }}]
[rate_limit]
enabled = false
[limits]
max_pixels = {MAX_PIXELS}
max_n = 2
max_steps = 20
max_prompt_chars = 2000
[queue]
request_timeout_seconds = 20
[webhooks]
secret = "{SECRETS[5]}"
[[backends]]
name = "painter"
protocol = "builtin"
models = ["painter"]
default_size = "32x32"
[[backends]]
name = "script"
protocol = "scripted"
models = ["script"]
default_size = "32x32"
[[backends]]
name = "closed"
protocol = "openai"
endpoints = ["http://127.0.0.1:9"]
models = ["closed"]
api_key = "{SECRETS[2]}"
headers = {{ X-Team = "{SECRETS[3]}" }}
[[backends]]
name = "shut"
protocol = "a1111"
endpoints = ["http://127.0.0.1:9"]
models = ["shut"]
username = "me"
password = "{SECRETS[4]}"
"""

MARK = "fuzzmark"
"""Is in every file name that a test sends as one that leads elsewhere."""

_OWN_NAMES = re.compile(
    r"config\.toml|stdout\.txt|stderr\.txt|data(/(job_inputs(/(\.img-[0-9a-f]{32}\.part|(img-)?[0-9a-f]{32}\.(png|jpg|webp)))?|[a-z_.-]+))?"
    r"|generated_images(/(\.img-[0-9a-f]{32}\.part|img-[0-9a-f]{32}\.(png|jpg|webp)))?"
)


def fuzzing(examples: int) -> settings:
    """`examples` in the suite, always the same; more of them, and new ones, in `make fuzz`."""
    return settings(
        max_examples=examples * FACTOR,
        deadline=None,
        derandomize=FACTOR == 1,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@dataclass(frozen=True)
class EdgeReply:
    """An answer; status 0: the connection was closed without one. `seconds` until its end."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    seconds: float

    @property
    def error(self) -> dict[str, Any]:
        """The error object."""
        return dict(json.loads(self.body)["error"])


class Edge:
    """The program, and everything that can be seen of it from outside."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.warmed_bytes = 0

    # sending

    def send(self, raw: bytes | list[bytes], *, seconds: float = 30.0, ends: bool = False) -> EdgeReply:
        """Write bytes to a new connection, a list piece by piece, and read one answer. `ends`: nothing follows them."""
        began = time.monotonic()
        with socket.create_connection(("127.0.0.1", self.program.port), timeout=seconds) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                for piece in [raw] if isinstance(raw, bytes) else raw:
                    connection.sendall(piece)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
            except ConnectionError:
                pass  # it was refused while it was still being sent; what was said of it can be read
            return _read(connection, raw if isinstance(raw, bytes) else b"".join(raw), began)

    def request(
        self,
        method: str,
        target: str | bytes,
        body: bytes = b"",
        headers: Mapping[str, str | bytes] | None = None,
        *,
        key: str | None = ADMIN,
        seconds: float = 30.0,
    ) -> EdgeReply:
        """One request, written as it stands: the target and the header values are not escaped."""
        return self.send(head(method, target, len(body), headers, key=key) + body, seconds=seconds)

    def ask(self, method: str, target: str | bytes, body: bytes = b"", **options: Any) -> EdgeReply:
        """The same, and what holds for every answer is checked."""
        reply = self.request(method, target, body, **options)
        self.check(reply)
        return reply

    def json(self, target: str, body: Any, **headers: str) -> EdgeReply:
        """POST JSON, and check the answer."""
        sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): one for name, one in headers.items()}
        return self.ask("POST", target, json.dumps(body).encode(), headers=sent)

    # what holds

    def check(self, reply: EdgeReply) -> None:
        """No 500, the four keys on every failure, nothing of ours that is nobody's business; and it lives."""
        assert self.program.process.poll() is None, "the program has ended"
        assert reply.status not in {0, 500}, reply
        for secret in SECRETS:
            assert secret.encode() not in reply.body, secret
            assert not any(secret in value for value in reply.headers.values()), secret
        assert b"Traceback" not in reply.body
        assert str(self.program.directory).encode() not in reply.body, "a path of this machine"
        assert reply.headers.get("x-request-id"), reply
        if reply.status >= 400 and reply.body:
            assert reply.headers["content-type"] == "application/json"
            error = reply.error
            assert set(error) == {"message", "type", "param", "code"}, error
            assert isinstance(error["message"], str)
            assert error["message"]
            assert isinstance(error["type"], str)
            assert error["type"]

    def check_files(self) -> None:
        """No file but ours, under names that are ours: in its directory, beside it, and in that for temporary files."""
        for name in _listing(self.program.directory):
            assert _OWN_NAMES.fullmatch(name), f"a file of a strange name: {name!r}"
        beside = {name for name in _listing(self.program.directory.parent) if not name.startswith("run")}
        assert beside == {"tmp"}, f"files beside its own directory: {beside}"
        found = {name for name in _listing(Path(tempfile.gettempdir()), depth=2) if MARK in name}
        assert not found, f"files that a client has named: {found}"

    def check_log(self) -> None:
        """What was unexpected is in the log, and no secret is."""
        log = self.program.log
        assert "unexpected error" not in log, log[log.index("unexpected error") - 200 :][:3000]
        assert "Traceback" not in log, log[log.index("Traceback") - 500 :][:3000]
        for secret in SECRETS:
            assert secret not in log, secret
        for line in log.splitlines():
            assert isinstance(json.loads(line), dict), f"a line that is no JSON: {line[:300]}"

    # memory

    def warm(self) -> None:
        """Load what the first pictures load; what is more than after this has come from what is sent."""
        for model in ("painter", "script"):
            body = {"prompt": "warm", "model": model, "size": "512x512", "n": 2, "output_format": "webp"}
            assert self.json("/v1/images/generations", body).status == 200
        self.warmed_bytes = self.peak_bytes()

    def peak_bytes(self) -> int:
        """The most resident memory that the program has had in its life."""
        status = Path(f"/proc/{self.program.process.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found is not None
        return int(found.group(1)) * 1024

    def check_memory(self, bound: int, what: object = "") -> None:
        """Its memory has not grown by more than `bound` bytes since it was warm, not even for a moment."""
        grown = self.peak_bytes() - self.warmed_bytes
        assert grown <= bound, f"{grown / 2**20:.0f} MiB more than when it was warm, after {what}"


@contextmanager
def edge(directory: Path) -> Iterator[Edge]:
    """Run the program until the block ends; at the end its files and its log must be in order."""
    (directory / "tmp").mkdir(parents=True)
    with serving(directory / "run", CONFIG, environment={"TMPDIR": str(directory / "tmp")}) as program:
        found = Edge(program)
        found.warm()
        yield found
        assert found.request("GET", "/livez").status == 200
        found.check_files()
        assert program.stop() == 0
        found.check_log()


def head(
    method: str,
    target: str | bytes,
    length: int | None = None,
    headers: Mapping[str, str | bytes] | None = None,
    *,
    key: str | None = ADMIN,
) -> bytes:
    """The head of a request, its end included; nothing in it is escaped."""
    lines = [method.encode("latin-1") + b" " + _raw(target) + b" HTTP/1.1", b"Host: gateway.test"]
    if key is not None:
        lines.append(b"Authorization: Bearer " + key.encode())
    if length is not None:
        lines.append(b"Content-Length: %d" % length)
    lines += [name.encode("latin-1") + b": " + _raw(value) for name, value in (headers or {}).items()]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _raw(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def _read(connection: socket.socket, raw: bytes, began: float) -> EdgeReply:
    method = raw.partition(b" ")[0].decode("latin-1")
    try:
        reply = http.client.HTTPResponse(connection, method=method)
        reply.begin()
        body = reply.read()
    except (http.client.BadStatusLine, ConnectionError):
        return EdgeReply(0, {}, b"", time.monotonic() - began)
    headers = {name.lower(): value for name, value in reply.headers.items()}
    return EdgeReply(reply.status, headers, body, time.monotonic() - began)


def _listing(directory: Path, depth: int = 9) -> set[str]:
    """The names below a directory; what comes and goes meanwhile is left out."""
    found: set[str] = set()
    levels = [directory]
    for _ in range(depth):
        inner: list[Path] = []
        for level in levels:
            try:
                entries = list(os.scandir(level))
            except OSError:
                continue
            found |= {str(Path(one.path).relative_to(directory)) for one in entries}
            inner += [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False)]
        levels = inner
    return found


def multipart(parts: list[tuple[str, bytes, str | None]], boundary: str = "x-boundary") -> tuple[bytes, str]:
    """A form, well made, and its Content-Type. Parts are (name, content, file name or None)."""
    out = io.BytesIO()
    for name, content, file in parts:
        named = f'; filename="{file}"' if file is not None else ""
        kind = "Content-Type: application/octet-stream\r\n" if file is not None else ""
        out.write(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n{kind}\r\n'.encode())
        out.write(content + b"\r\n")
    out.write(f"--{boundary}--\r\n".encode())
    return out.getvalue(), f"multipart/form-data; boundary={boundary}"
