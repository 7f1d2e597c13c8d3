"""Customers' files: a watched folder, or many in one packed file."""
