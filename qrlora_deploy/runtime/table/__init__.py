"""The coefficient table: where it lies, who has which row, when a row may be written."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("qrlora_deploy.runtime.table.table")

from qrlora_deploy.installation.parts import need

need("cpu", __name__)
