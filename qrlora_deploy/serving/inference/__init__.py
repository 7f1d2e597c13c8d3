"""The Open Inference Protocol, version 2, whatever carries it: requests, tensors, questions, descriptions."""
