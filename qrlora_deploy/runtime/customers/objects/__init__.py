"""Customers in an object store: listed again and again, read when they are asked for."""
