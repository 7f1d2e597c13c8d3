"""Parts of `benchmarks.gpu_graph`: shapes, graphs, and how they are run."""
