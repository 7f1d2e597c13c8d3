"""Parts of `benchmarks.gpu`: what it runs, how, and what it reads from the records."""
