"""`img-serving health`: whether a gateway or a worker is ready, as an exit code: what containers and service managers ask."""

from __future__ import annotations

import argparse
import os
import threading
from typing import Any, Final
from urllib.parse import urlsplit

from img_serving.cli.endings import FAILED, OK, CommandFailed, printable
from img_serving.cli.usage import Commands, seconds_above_zero, words

EXAMPLES = """\
Without --url and $IMG_SERVING_URL the gateway of this machine is asked, on the port that its configuration says (a port
given to `serve` with --port is not known here). It is ready when GET /readyz is 200; no key is needed.

examples:
  img-serving health
  img-serving health --url https://images.example.com
  img-serving health --url grpc://localhost:50051      a worker, whose model is loaded

exit codes: 0 ready, 1 not ready (one line on standard error says why), 2 wrong usage
"""

TIMEOUT_SECONDS: Final = 5.0
LONGEST_SECONDS: Final = 3600.0
"""A longer wait than anybody means; the system's calls take no number of any size."""


def register(commands: Commands[argparse.ArgumentParser]) -> None:
    """Tell argparse about the command."""
    parser = commands.add_parser("health", help="is the gateway, or a worker, ready?", epilog=EXAMPLES)
    parser.add_argument("--url", type=words, help="where it listens; grpc:// for a worker", metavar="URL")
    parser.add_argument(
        "--config",
        help="the gateway's configuration (default: $IMG_SERVING_CONFIG, else ./config/default.toml, else the defaults)",
        metavar="FILE",
    )
    parser.add_argument(
        "--timeout",
        type=seconds_above_zero,
        default=TIMEOUT_SECONDS,
        help=f"seconds to wait for its answer (default {TIMEOUT_SECONDS:g})",
        metavar="SECONDS",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Ask once.

    Raises:
        CommandFailed: it is not ready, or cannot be asked. Always exit code 1: to who watches, 2 may mean something else.
    """
    from img_serving.cli.client import URL_VARIABLE

    try:
        url = args.url or os.environ.get(URL_VARIABLE) or _configured_url(args.config)
        if urlsplit(url).scheme in {"grpc", "grpcs"}:
            _ask_worker(url, min(args.timeout, LONGEST_SECONDS))
        else:
            _ask_gateway(url, min(args.timeout, LONGEST_SECONDS))
    except (CommandFailed, ValueError) as error:
        raise CommandFailed(" ".join(str(error).split()), FAILED) from error
    print(printable(f"{url} is ready"))
    return OK


def _configured_url(config_file: str | None) -> str:
    """Where the gateway of this machine listens, as its configuration and the environment say."""
    from img_serving.cli.configuration import read_configuration

    server = read_configuration(config_file).config.server
    if server.port == 0:
        raise CommandFailed("server.port is 0, any free one: name the gateway with --url")
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


def _ask_gateway(url: str, timeout_seconds: float) -> None:
    """In a thread that is left behind: whoever answers a byte now and then never makes a socket's own time-out ring."""
    from img_serving.cli.client import Client

    client = Client(url, None)
    failed: list[Exception] = []

    def ask() -> None:
        try:
            client.call("GET", "/readyz", timeout_seconds=timeout_seconds)
        except Exception as error:  # whatever it is, it is told by the thread that waits
            failed.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(timeout_seconds + 0.1)  # its own time-out has the better words
    if asking.is_alive():
        raise CommandFailed(f"{url} did not answer within {timeout_seconds:g} s")
    if failed:
        raise failed[0]


def _ask_worker(url: str, timeout_seconds: float) -> None:
    """The standard health service of gRPC; it needs no token."""
    from img_serving.config.addresses import fault_of_url
    from img_serving.wire import hush_grpc

    fault = fault_of_url(url, {"grpc", "grpcs"})
    if fault is not None:
        raise CommandFailed(f"the worker's URL {fault}")
    hush_grpc()
    try:
        import grpc
        from grpc_health.v1 import health_pb2, health_pb2_grpc
    except ImportError:
        raise CommandFailed("to ask a worker needs gRPC: install img-serving with its extra `grpc`") from None
    parts = urlsplit(url)
    # a worker on this machine is not asked through a proxy
    options = (("grpc.enable_http_proxy", 0),)
    channel = (
        grpc.secure_channel(parts.netloc, grpc.ssl_channel_credentials(), options)
        if parts.scheme == "grpcs"
        else grpc.insecure_channel(parts.netloc, options)
    )
    with channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            reply = stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_seconds)
        except grpc.RpcError as error:
            raise CommandFailed(f"{url} does not answer: {_reason(error)}") from error
    if reply.status != health_pb2.HealthCheckResponse.SERVING:
        raise CommandFailed(f"{url} is not ready: its model is still being loaded, or it is about to end")


def _reason(error: Exception) -> str:
    """The status of a failed call, with its details where it has some."""
    code, details = getattr(error, "code", None), getattr(error, "details", None)
    name = code().name if callable(code) else type(error).__name__
    told = details() if callable(details) else None
    return f"{name} ({told})" if told else str(name)
