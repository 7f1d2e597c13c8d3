"""Decoders of this project in other runtimes: each in an environment of its own, its tokens held against PyTorch's."""
