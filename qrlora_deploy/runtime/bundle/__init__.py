"""Opening a bundle, and what its manifest is held against."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("qrlora_deploy.runtime.bundle.bundle")
