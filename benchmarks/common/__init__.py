"""What several benchmarks share: bases, layers, bundles, and what every record holds."""
