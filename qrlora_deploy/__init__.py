"""QR-LoRA adapters from training to production: one frozen basis, a small vector per customer."""

__version__ = "0.1.0"

from qrlora_deploy.deprecated import moved as _moved

_moved.install()
