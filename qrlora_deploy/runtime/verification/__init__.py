"""A bundle's answers held against reference answers."""
