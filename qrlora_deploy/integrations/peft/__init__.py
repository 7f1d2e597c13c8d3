"""Customers as adapters of the library PEFT, which share the basis in memory: `register()`, then PEFT as usual."""

from qrlora_deploy.integrations.peft.config import QRLoRAConfig
from qrlora_deploy.integrations.peft.folder import write_adapter
from qrlora_deploy.integrations.peft.model import QRLoRAModel
from qrlora_deploy.integrations.peft.registration import register

__all__ = ["QRLoRAConfig", "QRLoRAModel", "register", "write_adapter"]
