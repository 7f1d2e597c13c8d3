"""Making the method known to PEFT, whose own registration takes only methods that are part of it."""

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from qrlora_deploy.errors import InputError
from qrlora_deploy.integrations.peft.config import METHOD, QRLoRAConfig
from qrlora_deploy.integrations.peft.model import PREFIX, QRLoRAModel


def register() -> None:
    """Let PEFT open adapters of the method QRLORA from now on, in this process; again does nothing.

    `peft.utils.register_peft_method` refuses every name that is no member of the enumeration `PeftType`, which
    cannot be extended from outside. What it would do for one is done here: three entries in PEFT's own tables.

    Raises:
        InputError: PEFT has another method of this name or prefix.

    Examples:
        >>> from peft import PeftModel
        >>> from transformers import AutoModelForSequenceClassification
        >>> from qrlora_deploy.integrations.peft import register, write_adapter
        >>> write_adapter("base", "basis.safetensors", "customers/acme.safetensors", "adapters/acme")
        >>> register()
        >>> base = AutoModelForSequenceClassification.from_pretrained("base")
        >>> model = PeftModel.from_pretrained(base, "adapters/acme", adapter_name="acme")
        >>> model.active_adapter
        'acme'
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(METHOD)
    if known is QRLoRAConfig:
        return
    if known is not None or PREFIX in PEFT_TYPE_TO_PREFIX_MAPPING.values():
        raise InputError(f"PEFT has a method {METHOD} or a prefix {PREFIX} of its own already")
    PEFT_TYPE_TO_CONFIG_MAPPING[METHOD] = QRLoRAConfig
    PEFT_TYPE_TO_TUNER_MAPPING[METHOD] = QRLoRAModel
    PEFT_TYPE_TO_PREFIX_MAPPING[METHOD] = PREFIX
