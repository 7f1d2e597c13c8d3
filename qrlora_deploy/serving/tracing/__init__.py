"""Spans of requests for OpenTelemetry, written by hand; nothing here is imported unless spans are asked for."""

from qrlora_deploy.installation.parts import need

need("otel", "qrlora_deploy.serving.tracing")
