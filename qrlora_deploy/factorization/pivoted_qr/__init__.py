"""QR with column pivoting on GPUs, explained in docs/factorization.md; torch only, and Triton where it is there."""
