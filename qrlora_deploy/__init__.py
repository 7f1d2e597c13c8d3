"""QR-LoRA adapters from training to production: one frozen basis, a small vector per customer."""

from qrlora_deploy.deprecated import moved as _moved
from qrlora_deploy.version import __version__

__all__ = ["__version__"]

_moved.install()
