"""Decoders in a benchmark: how long answers take, token by token, and how many of them are right."""
