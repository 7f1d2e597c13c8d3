"""Parts of `benchmarks.glue`: data, methods, starts, runs and their records, the training loop, and the report."""
