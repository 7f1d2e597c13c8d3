"""A model repository for Triton: a graph whose every input has a batch axis, and a front that takes texts."""
