"""The server over gRPC: the Open Inference Protocol, version 2, with health and reflection."""
