"""Stubs of the worker's service, version 1 (`proto/img_serving/v1`), written by `scripts/protoc`."""
