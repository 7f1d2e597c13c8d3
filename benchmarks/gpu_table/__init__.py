"""Parts of `benchmarks.gpu_table`: customers, loading them, busy sessions, and what was aimed at."""
