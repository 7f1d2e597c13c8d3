"""Parts of `benchmarks.fleet`."""
