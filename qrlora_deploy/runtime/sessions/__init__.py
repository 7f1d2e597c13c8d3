"""How a bundle is run."""

from qrlora_deploy.installation.parts import need

need("cpu", __name__)
