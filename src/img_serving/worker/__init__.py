"""The other program: serves a model of your own over gRPC, for a gateway to send work to.

`img-serving worker` runs it; `docs/workers.md` tells how to bring a model of your own.
"""
