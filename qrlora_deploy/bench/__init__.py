"""Measuring bundles: scenarios, honest statistics, a report and a gate; no torch unless a peer asks for it."""
