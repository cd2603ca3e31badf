"""What holds for every test: gRPC keeps to itself what comes as an exception anyway."""

from __future__ import annotations

from img_serving.wire import hush_grpc

hush_grpc()
