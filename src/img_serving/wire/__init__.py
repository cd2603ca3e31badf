"""The gRPC services that we speak: stubs generated from `proto/`, and our values to and from their messages."""
