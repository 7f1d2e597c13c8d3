"""Parts of `benchmarks.models`: the families, one whole run of a family, results, and the page."""
