"""`GET /metrics` of a worker, over HTTP and in a thread of its own, so that it answers whatever the worker does."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from concurrent.futures import TimeoutError as LateError
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Final

from img_serving.domain.errors import StartError

_RENDER_SECONDS: Final = 5.0


class MetricsPage:
    """Serves what `render` gives, which is asked on `loop`, where the numbers are written."""

    def __init__(self, host: str, port: int, render: Callable[[], bytes], loop: asyncio.AbstractEventLoop) -> None:
        """Listen at once; `port` 0: any free one.

        Raises:
            StartError: the address is taken, or is none of this machine.
        """

        async def rendered() -> bytes:
            return render()

        class Handler(BaseHTTPRequestHandler):
            timeout = 10

            def do_GET(self) -> None:
                if self.path.partition("?")[0] != "/metrics":
                    self.send_error(404, "there is only /metrics")
                    return
                try:
                    body = asyncio.run_coroutine_threadsafe(rendered(), loop).result(_RENDER_SECONDS)
                except (LateError, RuntimeError):
                    self.send_error(503, "the worker is busy or stopping")
                    return
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its own name for it
                """Say nothing: a scrape every few seconds is no news."""

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                """Say nothing: a scraper that hung up is no news either."""

        try:
            self._server = Server((host, port), Handler)
        except OSError as error:
            raise StartError(
                f"the metrics page cannot listen on {host}:{port} ({error.strerror or error}); choose another port"
            ) from error
        self.port: int = self._server.server_address[1]
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(1.0)
