"""What benchmarks/gpu.py runs, how, and what it reads from the records."""
