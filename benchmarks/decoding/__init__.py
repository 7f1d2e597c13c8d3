"""How fast decoders write: exported graphs, PyTorch's ways and PEFT's, on the shapes of known models."""
