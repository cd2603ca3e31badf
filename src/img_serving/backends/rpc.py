"""What adapters to gRPC upstreams share: the connection, its credentials, and the meaning of a status code."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import grpc
import grpc.aio

from img_serving.backends.http import BUSY_LIMIT_SECONDS, BUSY_SECONDS, Redactor
from img_serving.domain.errors import (
    AttemptError,
    BackendRefusal,
    ContentRefused,
    InvalidRequest,
    NotFound,
    Outcome,
    PayloadTooLarge,
)
from img_serving.domain.images import Call

MAX_MESSAGE_BYTES: Final = 256 * 1024 * 1024
"""One message, either way. gRPC's own 4 MiB break on the first large picture."""

CONNECT_TIMEOUT_SECONDS: Final = 10.0
PORTS: Final = {"http": 80, "grpc": 80, "https": 443, "grpcs": 443}
NOT_STARTED_KEY: Final = "img-serving-not-started"

_TOO_LARGE: Final = "message larger than max"
_OUR_REQUEST: Final = re.compile("SERVER: Received|CLIENT: Sent")
_NOT_CONNECTED: Final = "failed to connect to all addresses"
"""gRPC's own words, as grpcio 1.85 has them."""

_PARAM: Final = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")

Metadata = tuple[tuple[str, str], ...]

_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # retries are the gateway's: it may go elsewhere
    ("grpc.enable_retries", 0),
    # else channels to one address would share one connection, and its back-off
    ("grpc.use_local_subchannel_pool", 1),
)


class Line:
    """The connection to one gRPC server: made when first needed, kept alive, made again after it was lost."""

    def __init__(
        self,
        url: str,
        *,
        ca_file: str | None = None,
        tls_verify: bool = True,
        api_key: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        proxy: str | None = None,
        keepalive_seconds: float = 0,
        options: Sequence[tuple[str, str | int]] = (),
    ) -> None:
        """`url` as in `[[backends]]`: `http(s)://` or `grpc(s)://`, host and port. `headers` go with every call as metadata.

        `keepalive_seconds` is how often a silent peer is asked whether it is still there; 0: never, for servers that take
        such questions for an attack (gRPC's own default allows one in five minutes). `options` are gRPC channel arguments on
        top of our own.

        Raises:
            ValueError: there is no such connection; the message says why.
        """
        parts = urlsplit(url)
        if parts.path.strip("/"):
            raise ValueError("endpoints: a gRPC address has no path")
        self.is_secure = parts.scheme in {"https", "grpcs"}
        if self.is_secure and not tls_verify:
            raise ValueError(
                "tls_verify: gRPC always checks certificates; name the server's own certificate as `ca_file` instead"
            )
        host = parts.hostname or ""
        host = f"[{host}]" if ":" in host else host
        self.target = f"{host}:{parts.port or PORTS[parts.scheme]}"
        self._roots = _read(ca_file) if self.is_secure and ca_file is not None else None
        headers = tuple(headers)
        for name, _ in headers:
            if name.lower().endswith("-bin") or name.lower().startswith("grpc-"):
                raise ValueError(f"headers: {name} means something else in gRPC, and cannot be set")
        bearer = (("authorization", f"Bearer {api_key}"),) if api_key is not None else ()
        self.metadata: Metadata = (*((name.lower(), value) for name, value in headers), *bearer)
        self.redactor = Redactor([api_key, *(value for _, value in self.metadata)])
        # without a proxy of ours gRPC must not look for one of its own: its rules for loopback are others
        through = (("grpc.http_proxy", proxy),) if proxy is not None else (("grpc.enable_http_proxy", 0),)
        alive: tuple[tuple[str, int], ...] = ()
        if keepalive_seconds:
            alive = (
                ("grpc.keepalive_time_ms", round(keepalive_seconds * 1000)),
                ("grpc.keepalive_timeout_ms", 10_000),
                ("grpc.http2.max_pings_without_data", 0),
            )
        self._options = (*_OPTIONS, *through, *alive, *options)
        self._channel: grpc.aio.Channel | None = None
        self._holders: dict[grpc.aio.Channel, int] = {}

    def __repr__(self) -> str:
        return f"<Line {self.target}{' TLS' * self.is_secure}>"

    @property
    def channel(self) -> grpc.aio.Channel:
        """The channel for calls; whoever calls holds it (`held`)."""
        if self._channel is None:
            if self.is_secure:
                credentials = grpc.ssl_channel_credentials(self._roots)
                self._channel = grpc.aio.secure_channel(self.target, credentials, self._options)
            else:
                self._channel = grpc.aio.insecure_channel(self.target, self._options)
        return self._channel

    def metadata_of(self, call: Call) -> Metadata:
        """The operator's own, and what lets one request be followed through both logs."""
        metadata = self.metadata
        if call.request_id and call.request_id.isascii():
            metadata += (("x-request-id", call.request_id),)
        if call.traceparent:
            metadata += (("traceparent", call.traceparent),)
        return metadata

    @asynccontextmanager
    async def held(self, timeout_seconds: float = CONNECT_TIMEOUT_SECONDS) -> AsyncIterator[grpc.aio.Channel]:
        """A connected channel, so that a call that fails was really sent. It stays open for as long as the block lasts.

        A server that goes away politely refuses new calls and finishes those that run: these keep their channel, while whoever
        comes later gets another.

        Raises:
            AttemptError: `NOT_STARTED`: nobody is there, or nobody we trust. `UNKNOWN`: the connection was closed under the
                calls of the block.
        """
        deadline = asyncio.get_running_loop().time() + timeout_seconds
        channel = self.channel
        if channel.get_state(try_to_connect=True) is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
            # it waits before it tries again, and we want to know now: whoever asks has waited already
            channel = await self._anew(channel)
        self._holders[channel] = self._holders.get(channel, 0) + 1
        try:
            await self._connected(channel, deadline, timeout_seconds)
            yield channel
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            # nobody cancelled us: it is how gRPC says that the channel was closed
            raise AttemptError(Outcome.UNKNOWN, "the connection was closed during the call") from None
        finally:
            self._holders[channel] -= 1
            if not self._holders[channel]:
                del self._holders[channel]
                if channel is not self._channel:
                    await channel.close()

    async def close(self) -> None:
        """Close the connection; calls in flight end."""
        channel, self._channel = self._channel, None
        for one in {channel, *self._holders}:
            if one is not None:
                await one.close()

    async def _connected(self, channel: grpc.aio.Channel, deadline: float, timeout_seconds: float) -> None:
        ready, failed = grpc.ChannelConnectivity.READY, grpc.ChannelConnectivity.TRANSIENT_FAILURE
        state = channel.get_state(try_to_connect=True)
        try:
            async with asyncio.timeout_at(deadline):
                while state is not ready:
                    if state in {failed, grpc.ChannelConnectivity.SHUTDOWN}:
                        raise AttemptError(Outcome.NOT_STARTED, f"no connection to {self.target}")
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise AttemptError(
                Outcome.NOT_STARTED, f"no connection to {self.target} within {timeout_seconds:g} s"
            ) from None
        except grpc.aio.UsageError:
            raise AttemptError(Outcome.NOT_STARTED, "the connection was closed") from None

    async def _anew(self, broken: grpc.aio.Channel) -> grpc.aio.Channel:
        """Another channel in place of one without a connection, unless somebody was quicker."""
        if self._channel is broken:
            self._channel = None
            if broken not in self._holders:
                await broken.close()
        return self.channel


def error_of(
    error: grpc.aio.AioRpcError, redactor: Redactor, also: Iterable[str | None] = ()
) -> AttemptError | BackendRefusal:
    """What a status means: whose fault it is, and whether trying elsewhere is free of risk.

    `also` are prompts, which no message may show. A status that gRPC makes on our side, for a connection that broke, looks
    like one that the server sent: so UNAVAILABLE leaves the outcome open unless it says otherwise.
    """
    code = error.code()
    trailers = {str(name).lower(): _as_text(value) for name, value in error.trailing_metadata() or ()}
    message = redactor.clean(error.details() or "", also)
    said = f": {message}" if message else ""
    kind = grpc.StatusCode
    if code in {kind.INVALID_ARGUMENT, kind.OUT_OF_RANGE}:
        refused = ContentRefused if trailers.get("img-serving-code") == "moderation_blocked" else InvalidRequest
        return BackendRefusal(
            refused(message or "the backend refused the request", param=_param(trailers, redactor, also))
        )
    if code is kind.NOT_FOUND:
        message = message or "the backend does not have this model"
        return BackendRefusal(NotFound(message, code="model_not_found", param="model"))
    if code is kind.RESOURCE_EXHAUSTED:
        if _TOO_LARGE in (error.details() or ""):
            if _OUR_REQUEST.search(error.details() or ""):
                return BackendRefusal(PayloadTooLarge("the request is too large for the backend"))
            return AttemptError(Outcome.FAILED, f"a picture is too large for gRPC as it is set up{said}")
        return AttemptError(Outcome.NOT_STARTED, f"the backend is busy{said}", busy_seconds=busy_seconds(trailers))
    if code in {kind.UNAUTHENTICATED, kind.PERMISSION_DENIED}:
        return AttemptError(Outcome.FAILED, f"the backend refused the gateway's credentials ({code.name})")
    if code is kind.UNAVAILABLE and NOT_STARTED_KEY in trailers:
        return AttemptError(Outcome.NOT_STARTED, f"the backend is not ready{said}")
    if code is kind.UNAVAILABLE and (error.details() or "").startswith(_NOT_CONNECTED):
        return AttemptError(Outcome.NOT_STARTED, "the connection was lost before the call")
    if code in {kind.UNAVAILABLE, kind.CANCELLED, kind.DEADLINE_EXCEEDED}:
        return AttemptError(Outcome.UNKNOWN, f"the call was cut ({code.name}){said}")
    return AttemptError(Outcome.FAILED, f"the backend answered {code.name}{said}")


def _param(trailers: dict[str, str], redactor: Redactor, also: Iterable[str | None]) -> str | None:
    """The parameter that a server names, if it is one and no secret of ours."""
    param = trailers.get("img-serving-param", "")
    return param if _PARAM.fullmatch(param) and redactor.clean(param, also) == param else None


def busy_seconds(trailers: dict[str, str]) -> float:
    """How long to leave a busy server alone: its `retry-after-ms` in milliseconds, else 1 second."""
    try:
        seconds = float(trailers.get("retry-after-ms", "")) / 1000
    except ValueError:
        return BUSY_SECONDS
    return min(seconds, BUSY_LIMIT_SECONDS) if 0 <= seconds < float("inf") else BUSY_SECONDS


def _as_text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"ca_file: cannot be read ({error.strerror or error})") from None
