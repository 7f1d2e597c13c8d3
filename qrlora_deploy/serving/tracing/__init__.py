"""Spans of requests for OpenTelemetry, written by hand; nothing here is imported unless spans are asked for."""
