"""Exporters and how they are found."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of(
    "qrlora_deploy.exporting.registry", "qrlora_deploy.exporting.job", "qrlora_deploy.exporting.exporter"
)
