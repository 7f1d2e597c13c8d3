"""How a bundle is run."""
