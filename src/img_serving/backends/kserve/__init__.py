"""The Open Inference Protocol v2 over gRPC (KServe, Triton): the adapter, what a model's tensors carry, their contents."""

from img_serving.backends.kserve.adapter import KServeBackend

__all__ = ["KServeBackend"]
