"""Customers in other libraries' models, while they run there."""
