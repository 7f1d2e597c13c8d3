"""Models that write text, built as ONNX graphs from a description of their family: no tracing, weights straight from
safetensors to external data."""
