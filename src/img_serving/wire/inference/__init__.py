"""Stubs of the Open Inference Protocol v2 (`proto/inference`), written by `scripts/protoc`."""
