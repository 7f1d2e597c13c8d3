"""Exporters and how they are found."""
