"""A1111's web API: the adapter, what a server of that kind is and has, and what travels."""

from img_serving.backends.a1111.adapter import DEFAULT_BATCH, A1111Backend

__all__ = ["DEFAULT_BATCH", "A1111Backend"]
