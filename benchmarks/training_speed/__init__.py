"""Parts of `benchmarks.training_speed`: what the subjects share, and the subjects."""
