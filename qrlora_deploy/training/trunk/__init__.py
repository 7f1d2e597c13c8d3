"""Splitting a model below its adapted layers, and what the frozen part answers."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("qrlora_deploy.training.trunk.split")
