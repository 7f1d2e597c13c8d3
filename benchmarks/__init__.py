"""Programs that reproduce published figures: `python -m benchmarks.NAME --help`."""
