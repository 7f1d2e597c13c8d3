"""Pivoted QR of a base's weights."""

from qrlora_deploy.deprecated.moved import names_of
from qrlora_deploy.installation.parts import need

need("train", __name__, ["torch", "scipy"])

__getattr__ = names_of("qrlora_deploy.factorization.decomposition")
