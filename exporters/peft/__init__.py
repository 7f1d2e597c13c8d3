"""A customer as a LoRA folder that the library PEFT loads."""

from qrlora_deploy.deprecated.moved import names_of

__getattr__ = names_of("exporters.peft.lora_folder")
