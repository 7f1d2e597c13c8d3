"""The parts of `benchmarks/glue.py`: data, methods, starts, the training loop, records, and the report."""
