"""What a file, a bundle or an environment is."""
