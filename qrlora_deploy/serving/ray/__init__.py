"""A server on more than one machine: fronts anywhere, replicas by Ray Serve."""
