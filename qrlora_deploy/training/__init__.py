"""Labelled text in, a customer's coefficients out; and the warm-up that gives a base its head."""

from qrlora_deploy.installation.parts import need

need("train", __name__, ["torch"])
