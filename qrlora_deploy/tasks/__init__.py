"""What a model answers, and how an answer is scored."""
