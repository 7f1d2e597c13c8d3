"""Pivoted QR of a base's weights."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("qrlora_deploy.factorization.decomposition")
