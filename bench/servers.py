"""The three servers of the benchmark: the canned upstream, nginx as the reference proxy, and the gateway under test."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import secrets
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from processes import BenchError, Cores, Program, wait_until

ROUTE = "/v1/images/generations"
GATEWAY = Path(__file__).parent.parent / ".venv" / "bin" / "img-serving"
MANY = 100_000_000


@dataclass(frozen=True)
class Reply:
    """One canned answer: the picture in it, and the request that a client sends to get it."""

    model: str
    label: str
    size: tuple[int, int]
    png: bytes

    @property
    def body(self) -> bytes:
        picture = base64.b64encode(self.png).decode()
        return json.dumps({"created": 1700000000, "data": [{"b64_json": picture}]}, separators=(",", ":")).encode()

    @property
    def request(self) -> str:
        width, height = self.size
        wanted = {
            "model": self.model,
            "prompt": "a lighthouse",
            "response_format": "b64_json",
            "size": f"{width}x{height}",
        }
        return json.dumps(wanted)


def canned_replies() -> dict[str, Reply]:
    """A flat picture in a JSON of about 150 B, and seeded noise, which no PNG can shrink, in one of 2.0 MB."""
    import numpy as np
    from PIL import Image

    def png(pixels: object) -> bytes:
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()

    noise = np.random.default_rng(1).integers(0, 256, (704, 712, 3), dtype=np.uint8)
    return {
        "small": Reply("small", "small", (8, 8), png(np.zeros((8, 8, 3), np.uint8))),
        "big": Reply("big", "2 MB", (712, 704), png(noise)),
    }


@dataclass(frozen=True)
class Target:
    """Where a server answers for each model, and the process whose tree pays for it."""

    name: str
    program: Program
    ports: Mapping[str, int]


# ---------------------------------------------------------------------------------------------------------------- nginx


def start_upstream(nginx: str, directory: Path, replies: Mapping[str, Reply], ports: list[int], cores: Cores) -> Target:
    """Serve every canned reply on its own port, and nginx's own counters on the last one (model `status`)."""
    servers = []
    for reply, port in zip(replies.values(), ports, strict=False):
        root = directory / "canned" / reply.model
        (root / "v1" / "images").mkdir(parents=True)
        (root / ROUTE[1:]).write_bytes(reply.body)
        models = {"object": "list", "data": [{"id": reply.model, "object": "model", "created": 0, "owned_by": "bench"}]}
        (root / "v1" / "models").write_text(json.dumps(models))
        # A static file refuses POST with 405; sending that to the same address once more, now as GET, makes it a 200.
        servers.append(
            f"server {{ listen 127.0.0.1:{port} backlog=4096; root {root};"
            " location / { error_page 405 =200 $uri; } }"
        )
    status = ports[len(replies)]
    servers.append(f"server {{ listen 127.0.0.1:{status}; location / {{ stub_status; }} }}")
    http_block = f"""
        access_log off;
        sendfile on;
        tcp_nopush on;
        open_file_cache max=16 inactive=1h;
        open_file_cache_valid 1h;
        {" ".join(servers)}
    """
    program = _start_nginx(nginx, "upstream", directory, http_block, cores.others)
    target = Target("upstream", program, {**dict(zip(replies, ports, strict=False)), "status": status})
    _wait_for(program, status, "/")
    return target


def start_nginx_proxy(nginx: str, directory: Path, upstream: Target, ports: list[int], cores: Cores) -> Target:
    """One worker; a kept-alive upstream pool; an access log, written by the buffer as the gateway writes its own.

    The 2 MB server has 64 buffers of 64 KiB, so a whole reply fits in memory and no temporary file is ever written.
    The small one keeps nginx's defaults, because one large first buffer per request would cost it something.
    """
    models = [model for model in upstream.ports if model != "status"]
    pools = " ".join(
        f"upstream {model} {{ server 127.0.0.1:{upstream.ports[model]};"
        f" keepalive 512; keepalive_requests {MANY}; keepalive_timeout 1h; }}"
        for model in models
    )
    buffers = {"big": "proxy_buffer_size 64k; proxy_buffers 64 64k; proxy_busy_buffers_size 256k;"}
    servers = " ".join(
        f"server {{ listen 127.0.0.1:{port} backlog=4096; {buffers.get(model, '')}"
        f" location / {{ proxy_pass http://{model}; }} }}"
        for model, port in zip(models, ports, strict=False)
    )
    http_block = f"""
        access_log {directory}/nginx-access.log combined buffer=32k flush=1s;
        proxy_http_version 1.1;
        proxy_set_header Connection "";
        proxy_max_temp_file_size 0;
        tcp_nodelay on;
        {pools}
        {servers}
    """
    program = _start_nginx(nginx, "nginx", directory, http_block, cores.proxy)
    target = Target("nginx", program, dict(zip(models, ports, strict=False)))
    _wait_for(program, ports[0], "/v1/models")
    return target


def _start_nginx(nginx: str, name: str, directory: Path, http_block: str, core: int) -> Program:
    config = directory / f"{name}.conf"
    temporary = " ".join(
        f"{kind}_temp_path {directory}/{name}-{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    # Started by root, nginx would drop to a user who may not read our directory.
    user = "user root root;" if os.geteuid() == 0 else ""
    config.write_text(f"""
        {user}
        daemon off;
        worker_processes 1;
        pid {directory}/{name}.pid;
        error_log {directory}/{name}.out warn;
        events {{ worker_connections 8192; }}
        http {{
            {temporary}
            default_type application/json;
            keepalive_requests {MANY};
            keepalive_timeout 1h;
            {http_block}
        }}
    """)
    return Program(name, [nginx, "-p", directory, "-c", config], core=core, directory=directory, patience_seconds=5)


# -------------------------------------------------------------------------------------------------------------- gateway


def gateway_config(directory: Path, upstream: Mapping[str, int], key: str) -> str:
    """Everything on that a real gateway has on (keys, rate limit, queue, metrics, log), its limits too high to be met."""
    head = f"""
[server]
data_dir = "{directory}/data"

[auth]
api_keys = ["{key}"]

[rate_limit]
requests_per_second = 1000000
burst_size = 1000000

[queue]
max_tasks = 100000

[storage]
dir = "{directory}/images"

[logging]
level = "info"
format = "json"
"""
    backends = (
        f"""
[[backends]]
name = "{model}"
protocol = "openai"
endpoints = ["http://127.0.0.1:{port}/v1"]
models = ["{model}"]
max_concurrency = 512
"""
        for model, port in upstream.items()
        if model != "status"
    )
    return head + "".join(backends)


def start_gateway(
    directory: Path,
    config: str,
    port: int,
    core: int,
    *,
    command: str = "",
    ready_path: str = "/readyz",
    values: Mapping[str, str] | None = None,
    poll_seconds: float = 0.02,
) -> tuple[Program, float]:
    """Start the gateway and wait until it is ready; the seconds that took.

    `command` starts another program instead; {port}, {config}, {dir} and the names in `values` are filled in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    file = directory / "gateway.toml"
    file.write_text(config)
    known = {"port": str(port), "config": str(file), "dir": str(directory), **(values or {})}
    if command:
        for name, value in known.items():
            command = command.replace("{" + name + "}", shlex.quote(value))
        words = shlex.split(command)
    else:
        words = [str(GATEWAY), "serve", "--config", str(file), "--host", "127.0.0.1", "--port", str(port)]
    # Settings of whoever runs the benchmark must not reach the gateway under test.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("IMG_SERVING")}
    program = Program("gateway", words, core=core, directory=directory, environment=environment)
    return program, _wait_for(program, port, ready_path, every_seconds=poll_seconds)


def new_key() -> str:
    return f"bench-{secrets.token_hex(20)}"


# --------------------------------------------------------------------------------------------------------------- checks


def check_reply(name: str, port: int, reply: Reply, key: str) -> int:
    """Ask twice on one connection: a 200, JSON, with its length, holding the very picture, and the connection kept.

    Returns the bytes of a reply with its headers, which those under load are compared with.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    where = f"{name}, {reply.label} reply"
    try:
        for _ in range(2):
            connection.request("POST", ROUTE, reply.request, headers)
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise BenchError(f"{where}: status {answer.status}: {body[:500].decode(errors='replace')}")
            if not (answer.getheader("content-type") or "").startswith("application/json"):
                raise BenchError(f"{where}: content-type {answer.getheader('content-type')!r}")
            if answer.getheader("content-length") not in {None, str(len(body))}:
                raise BenchError(f"{where}: content-length {answer.getheader('content-length')} for {len(body)} bytes")
            if base64.b64decode(json.loads(body)["data"][0]["b64_json"]) != reply.png:
                raise BenchError(f"{where}: the picture is not the upstream's")
            if connection.sock is None:
                raise BenchError(f"{where}: the connection was closed after a reply")
        return len(body) + sum(len(name) + len(value) + 4 for name, value in answer.getheaders())
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
        raise BenchError(f"{where}: {error!r}") from error
    finally:
        connection.close()


def upstream_counters(upstream: Target) -> tuple[int, int]:
    """Connections accepted and requests answered by the upstream so far."""
    connection = http.client.HTTPConnection("127.0.0.1", upstream.ports["status"], timeout=10)
    try:
        connection.request("GET", "/")
        accepted, _, requests = connection.getresponse().read().decode().splitlines()[2].split()
    finally:
        connection.close()
    return int(accepted), int(requests)


def _wait_for(program: Program, port: int, path: str, *, every_seconds: float = 0.02) -> float:
    """Seconds until it answers; a program that does not is ended here, since nobody else has it yet."""
    what = f"200 from http://127.0.0.1:{port}{path}"
    try:
        return wait_until(_answers_200(port, path), program, what, timeout_seconds=60, every_seconds=every_seconds)
    except BaseException:
        program.stop()
        raise


def _answers_200(port: int, path: str) -> Callable[[], bool]:
    def asks() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", path)
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    return asks
