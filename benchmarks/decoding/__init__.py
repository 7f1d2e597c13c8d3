"""How fast decoders are written by: the graphs that the project exports, PyTorch's ways and PEFT's, on shapes of known models."""
