"""The gRPC services that we speak: stubs generated from `proto/`, and our values to and from their messages."""

from __future__ import annotations

import os


def hush_grpc() -> None:
    """Keep gRPC from writing to standard error, between the lines of our log; to be called before it is imported.

    What goes wrong comes to us as an exception anyway. Who wants to see more sets GRPC_VERBOSITY.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
