"""Parts of `benchmarks.gpu_graph`."""
