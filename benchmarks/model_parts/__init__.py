"""The parts of `benchmarks/models.py`: the families, one whole run of a family, and the page."""
