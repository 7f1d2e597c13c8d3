"""Labelled text in, a customer's coefficients out; and the warm-up that gives a base its head."""
