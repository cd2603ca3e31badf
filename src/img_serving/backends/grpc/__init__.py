"""The adapter to workers that speak `img_serving.v1`: ours, or one in any language."""

from img_serving.backends.grpc.adapter import GrpcBackend

__all__ = ["GrpcBackend"]
