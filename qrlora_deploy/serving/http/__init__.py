"""HTTP in front of the engines: the Open Inference Protocol v2, and plain JSON for people."""
