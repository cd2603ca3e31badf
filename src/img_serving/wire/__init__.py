"""The gRPC services that we speak: stubs generated from `proto/`, and our values to and from their messages."""

from __future__ import annotations

import asyncio
import logging
import os


def hush_grpc() -> None:
    """Keep gRPC from writing to standard error, between the lines of our log; to be called before it is imported.

    What goes wrong comes to us as an exception anyway. Who wants to see more sets GRPC_VERBOSITY.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    logging.getLogger("grpc._cython.cygrpc").addFilter(_is_no_cancellation)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Calls that are cut at the end of a drain are no news, and no reason for a traceback."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
