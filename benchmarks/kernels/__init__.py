"""What ONNX Runtime's kernels do where their documentation says nothing: guesses, and what was found."""
