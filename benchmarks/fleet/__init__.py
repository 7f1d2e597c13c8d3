"""Parts of `benchmarks.fleet`: the set-up, the rows, the peers, and where the seconds go."""
