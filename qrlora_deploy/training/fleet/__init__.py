"""Thousands of customers trained in one process: every row of a batch belongs to some customer."""
