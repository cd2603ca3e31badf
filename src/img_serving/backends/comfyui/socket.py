"""The websocket to ComfyUI: opened for one prompt, reconnected while that lasts, and closed without ceremony."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

from img_serving.backends.comfyui.events import FEATURE_FLAGS, MAX_FRAME_BYTES
from img_serving.backends.http import Headers
from img_serving.transport.proxy import Proxy

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection, connect

log = logging.getLogger(__name__)

_SILENT: Final = logging.getLogger("img_serving.backends.comfyui.socket.websockets")
"""At debug level the library would write credentials and prompts into the log."""

_SILENT.setLevel(logging.CRITICAL + 1)


class ComfyUISocket:
    """Where the websocket is, and how to get there."""

    def __init__(
        self,
        url: str,
        *,
        headers: Headers = (),
        proxy: Proxy | None = None,
        ssl_context: ssl.SSLContext | None = None,
        open_seconds: float = 5.0,
        reconnect_seconds: tuple[float, float] = (0.1, 5.0),
    ) -> None:
        """`url` is ws(s)://host[:port][/prefix]/ws; `reconnect_seconds` is the first pause after a failure, and the longest."""
        self._url = url
        self._headers = headers
        self._proxy = proxy
        self._ssl_context = ssl_context
        self._open_seconds = open_seconds
        self._reconnect_seconds = reconnect_seconds

    def __repr__(self) -> str:
        return f"<ComfyUISocket {self._url}>"

    async def listen(
        self, client_id: str, on_frame: Callable[[str | bytes], None], on_change: Callable[[bool], None]
    ) -> None:
        """Hand on every frame, until cancelled. `on_change` hears of each connection that is there, and of each that is not.

        A connection that fails or is cut is tried again, after longer and longer pauses.
        """
        from websockets.exceptions import WebSocketException  # noqa: PLC0415 - imported late: only a drawing needs it

        first, longest = self._reconnect_seconds
        pause = first
        while True:
            connection: ClientConnection | None = None
            try:
                connection = await self._connect(client_id)
                await connection.send(FEATURE_FLAGS)
                on_change(True)
                pause = first
                async for frame in connection:
                    on_frame(frame)
            except (OSError, ValueError, WebSocketException):
                pass  # the websocket is a hint: who wants the truth asks for it
            finally:
                if connection is not None:
                    # no handshake of farewell: nothing may be waited for when a call is cancelled
                    connection.transport.abort()
            on_change(False)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)

    async def _connect(self, client_id: str) -> ClientConnection:
        more: dict[str, Any] = {} if self._ssl_context is None else {"ssl": self._ssl_context}
        return await _connect_class()(
            f"{self._url}?clientId={quote(client_id)}",
            additional_headers=list(self._headers),
            user_agent_header="img-serving",
            compression=None,
            proxy=None if self._proxy is None else self._proxy.url,
            open_timeout=self._open_seconds,
            ping_interval=None,  # the history is asked every second: that is ping enough
            max_size=MAX_FRAME_BYTES,
            logger=_SILENT,
            **more,
        )


@lru_cache(maxsize=1)
def _connect_class() -> type[connect]:
    from websockets.asyncio.client import connect  # noqa: PLC0415 - imported late: only a drawing needs it

    class Connect(connect):
        """Follows no redirect: credentials would go along to wherever it points."""

        def process_redirect(self, exc: Exception) -> Exception | str:
            return exc

    return Connect


@asynccontextmanager
async def beside(coroutine: Coroutine[Any, Any, None], name: str) -> AsyncIterator[None]:
    """Run it beside the block, and not a moment longer. What breaks in it is logged and does not end the block."""
    task = asyncio.ensure_future(coroutine)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("%s broke", name, exc_info=error)
