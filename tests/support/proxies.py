"""Starts real reverse proxies from the files in deploy/proxies: only ports and paths are replaced, the rest is as it is."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.programs import free_port

SNIPPETS = Path(__file__).parents[2] / "deploy" / "proxies"
FILES = {"nginx": "nginx.conf", "haproxy": "haproxy.cfg", "caddy": "Caddyfile"}
HOST = "images.example.com"
UPSTREAM = "127.0.0.1:8080"
READY_SECONDS = 30.0

NGINX_FRAME = """\
pid {directory}/nginx.pid;
error_log {directory}/proxy.txt;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/bodies;
    proxy_temp_path {directory}/replies;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{snippet}
}}
"""
"""What Debian's nginx.conf is to a file in conf.d, with every path in a directory of the test's own."""

HAPROXY_DEFAULTS = """\
defaults
    mode http
    timeout connect 5000
    timeout client 50000
    timeout server 50000
"""
"""What Debian's haproxy.cfg says before the snippet that is appended to it."""

CADDY_OPTIONS = """\
{{
    admin off
    http_port {plain}
    https_port {port}
    default_bind 127.0.0.1
    local_certs
    skip_install_trust
    storage file_system {directory}/caddy
    servers {{
        protocols h1 h2
    }}
}}
"""
"""Instead of a public authority, Caddy's own one signs: nobody here could prove to own the name."""


@dataclass(frozen=True)
class Answered:
    """One whole answer, its header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Proxy:
    """A running proxy that speaks TLS under the name of its snippet."""

    def __init__(self, name: str, directory: Path, port: int, plain_port: int, authority: Path) -> None:
        self.name = name
        self.directory = directory
        self.port = port
        self.plain_port = plain_port
        self.authority = authority
        """The certificate that clients have to trust."""

    @property
    def url(self) -> str:
        return f"https://{HOST}:{self.port}"

    def socket(self, seconds: float = 60.0) -> ssl.SSLSocket:
        """A connection to it, under its name."""
        context = ssl.create_default_context(cafile=str(self.authority))
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=seconds)
        return context.wrap_socket(plain, server_hostname=HOST)

    def connect(self, seconds: float = 60.0) -> http.client.HTTPConnection:
        """The same for http.client. `seconds` of silence are a TimeoutError."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=seconds)
        connection.sock = self.socket(seconds)
        return connection

    def ask(
        self,
        method: str,
        path: str,
        *,
        key: str | None = None,
        body: bytes | dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        seconds: float = 60.0,
    ) -> Answered:
        """Ask on a connection of its own, and read the whole answer.

        Raises:
            http.client.HTTPException: there is none, or not all of it.
        """
        connection = self.connect(seconds)
        try:
            send(connection, method, path, key=key, body=body, headers=headers)
            answered = connection.getresponse()
            given = {name.lower(): value for name, value in answered.getheaders()}
            return Answered(answered.status, given, answered.read())
        finally:
            connection.close()


@contextmanager
def preferring_http_2(proxy: Proxy, path: str, *, key: str, body: dict[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """A POST of curl's, over HTTP/2 where it is offered: it writes the body, and then `status/version`.

    The block's end is its own.
    """
    curl = shutil.which("curl")
    if curl is None or b"HTTP2" not in subprocess.run([curl, "--version"], capture_output=True, check=True).stdout:
        pytest.skip("NO CURL: there is none here that speaks HTTP/2")
    arguments = [
        "--silent",
        "--show-error",
        "--no-buffer",
        "--http2",
        "--cacert",
        str(proxy.authority),
        "--max-time",
        "90",
    ]
    arguments += ["--resolve", f"{HOST}:{proxy.port}:127.0.0.1", "--write-out", "\n%{http_code}/%{http_version}"]
    arguments += ["-H", f"Authorization: Bearer {key}", "-H", "Content-Type: application/json", "-d", json.dumps(body)]
    with subprocess.Popen([curl, *arguments, proxy.url + path], stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def send(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    *,
    key: str | None = None,
    body: bytes | dict[str, Any] | None = None,
    headers: Mapping[str, str] | None = None,
) -> None:
    """Send a request; a `dict` goes as JSON."""
    sent = {} if key is None else {"Authorization": f"Bearer {key}"}
    if isinstance(body, dict):
        body = json.dumps(body).encode()
        sent["Content-Type"] = "application/json"
    connection.request(method, path, body, {**sent, **(headers or {})})


def program_of(name: str) -> str | None:
    """Where the proxy's program is, if it is installed; Debian has two of them where only root looks."""
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


@contextmanager
def proxying(name: str, directory: Path, upstream_port: int, *, snippet: str | None = None) -> Iterator[Proxy]:
    """Run the proxy `name` in front of a port of ours until the block ends.

    `snippet` stands in for its file, for a test that wants to see what happens without a line.
    Skips where the program is absent.
    """
    program = program_of(name)
    if program is None:
        pytest.skip(f"NO {name.upper()}: the package {name} is not installed")
    directory.mkdir(parents=True, exist_ok=True)
    text = snippet if snippet is not None else (SNIPPETS / FILES[name]).read_text()
    port, plain = free_port(), free_port()
    text = _once(text, UPSTREAM, f"127.0.0.1:{upstream_port}")
    arguments, authority = _PREPARED[name](text, directory, port, plain)
    with (directory / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [program, *arguments],
            cwd=directory,
            env={**os.environ, "HOME": str(directory), "XDG_DATA_HOME": str(directory), "XDG_CONFIG_HOME": str(directory)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            proxy = Proxy(name, directory, port, plain, authority)
            _wait(process, proxy)
            yield proxy
        finally:
            process.terminate()
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:  # connections that tests left open
                process.kill()
                process.wait()


def answer_on(connection: ssl.SSLSocket) -> Answered:
    """The next answer on a connection that the request was written to by hand."""
    with http.client.HTTPResponse(connection) as answered:
        answered.begin()
        return Answered(
            answered.status, {name.lower(): value for name, value in answered.getheaders()}, answered.read()
        )


def _once(text: str, found: str, instead: str) -> str:
    """Replace what must be there."""
    assert found in text, f"the snippet has no {found!r} any more"
    return text.replace(found, instead)


def _nginx(text: str, directory: Path, port: int, plain: int) -> tuple[list[str], Path]:
    for v6 in ("    listen [::]:80;\n", "    listen [::]:443 ssl http2;\n"):
        text = _once(text, v6, "")  # a second listener, for which there is no port to take
    text = _once(text, "listen 80;", f"listen 127.0.0.1:{plain};")
    text = _once(text, "listen 443 ssl", f"listen 127.0.0.1:{port} ssl")
    certificate, key = _certificate(directory)
    text = _once(text, f"/etc/letsencrypt/live/{HOST}/fullchain.pem", str(certificate))
    text = _once(text, f"/etc/letsencrypt/live/{HOST}/privkey.pem", str(key))
    path = directory / "nginx.conf"
    path.write_text(NGINX_FRAME.format(directory=directory, snippet=text))
    return ["-p", str(directory), "-e", str(directory / "proxy.txt"), "-c", str(path), "-g", "daemon off;"], certificate


def _haproxy(text: str, directory: Path, port: int, plain: int) -> tuple[list[str], Path]:
    certificate, key = _certificate(directory)
    both = directory / "both.pem"
    both.write_bytes(certificate.read_bytes() + key.read_bytes())
    text = _once(text, "bind :80\n", f"bind 127.0.0.1:{plain}\n")
    text = _once(text, "bind :443 ", f"bind 127.0.0.1:{port} ")
    text = _once(text, f"/etc/haproxy/certs/{HOST}.pem", str(both))
    path = directory / "haproxy.cfg"
    path.write_text(f"{HAPROXY_DEFAULTS}\n{text}")
    return ["-db", "-f", str(path)], certificate


def _caddy(text: str, directory: Path, port: int, plain: int) -> tuple[list[str], Path]:
    path = directory / "Caddyfile"
    path.write_text(CADDY_OPTIONS.format(plain=plain, port=port, directory=directory) + text)
    authority = directory / "caddy" / "pki" / "authorities" / "local" / "root.crt"
    return ["run", "--config", str(path), "--adapter", "caddyfile"], authority


_PREPARED = {"nginx": _nginx, "haproxy": _haproxy, "caddy": _caddy}


def _certificate(directory: Path) -> tuple[Path, Path]:
    """A certificate for the name in the snippets, signed by itself, and its key."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("NO OPENSSL: a certificate cannot be made")
    certificate, key = directory / "cert.pem", directory / "key.pem"
    arguments = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subprocess.run(
        [
            *(openssl, *arguments.split(), "-subj", f"/CN={HOST}", "-addext", f"subjectAltName=DNS:{HOST}"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
    )
    return certificate, key


def _wait(process: subprocess.Popen[bytes], proxy: Proxy) -> None:
    until = time.monotonic() + READY_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(OSError):  # it does not listen yet, or Caddy has no certificate yet
            proxy.socket(5.0).close()
            return
        time.sleep(0.05)
    said = [
        path.read_text() for path in (proxy.directory / "output.txt", proxy.directory / "proxy.txt") if path.exists()
    ]
    raise AssertionError(f"{proxy.name} did not start: {' '.join(said)}")
