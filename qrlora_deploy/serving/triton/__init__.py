"""A model of Triton's Python backend in front of a per-row graph, which Triton itself batches and runs."""
