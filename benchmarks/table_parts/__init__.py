"""The parts of `benchmarks.gpu_table`."""
