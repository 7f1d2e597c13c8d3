"""Exact arithmetic on coefficients and weights: merge, unmerge, combine."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("qrlora_deploy.merging.checkpoints")
