"""What a worker is told at its start: where it listens, who may call, how much it takes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

DEFAULT_PORT: Final = 50051
DEFAULT_DRAIN_SECONDS: Final = 15.0
DEFAULT_QUEUE_SIZE: Final = 64


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """One worker's settings.

    Attributes:
        host: address to listen on.
        port: port to listen on; 0: any free one.
        model: the name under which the model is served.
        any_model: whether requests for other names are served too.
        slots: calls drawn at the same time.
        queue_size: calls that may wait beyond those; more are told to come back later.
        max_batch_size: pictures in one call at most; None: what the engine can.
        token: what callers must send as `authorization: Bearer …`; None: anybody may call.
        tls_cert: PEM file of the certificate chain; None: no TLS.
        tls_key: PEM file of its key.
        metrics_port: where `GET /metrics` answers over HTTP; None: nowhere.
        drain_seconds: how long running calls may take to finish after SIGTERM.
        warm_up: whether a small picture is drawn before the first request.
    """

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    model: str = "model"
    any_model: bool = False
    slots: int = 1
    queue_size: int = DEFAULT_QUEUE_SIZE
    max_batch_size: int | None = None
    token: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    metrics_port: int | None = None
    drain_seconds: float = DEFAULT_DRAIN_SECONDS
    warm_up: bool = True

    def __repr__(self) -> str:
        """Without the token."""
        return f"<WorkerOptions {self.model} on {self.host}:{self.port}: {self.slots} slots>"
