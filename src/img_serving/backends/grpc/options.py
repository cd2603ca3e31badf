"""The operator's table `[backends.grpc]`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from img_serving.backends.options import read_options


class GrpcOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`[backends.grpc]`.

    Attributes:
        keepalive_seconds: how often a silent worker is asked whether it is still there; 0: never.
        connect_timeout_ms: milliseconds for a connection to come about.
        server_name: the name in the worker's certificate, where it is not that of the endpoint.
    """

    keepalive_seconds: Annotated[float, Meta(ge=0, le=3600)] = 30
    connect_timeout_ms: Annotated[int, Meta(ge=1, le=600_000)] = 10_000
    server_name: Annotated[str, Meta(min_length=1)] | None = None


def read_grpc_options(table: Mapping[str, Any]) -> GrpcOptions:
    """The table, checked.

    Raises:
        ValueError: naming the option, what is wrong with it, and the nearest that would be right.
    """
    options = read_options(GrpcOptions, table)
    if 0 < options.keepalive_seconds < 5:
        raise ValueError("keepalive_seconds: must be 0 (never) or at least 5: workers take more for an attack")
    return options
