"""In which precision training computes: coefficients are fp32 always, the frozen base is what saves memory."""

import torch
from torch import nn

from qrlora_deploy.models.adapter import QRLoRALinear


def has_bf16(device_type: str) -> bool:
    """Whether training computes in bf16: on a GPU that has it."""
    return device_type == "cuda" and torch.cuda.is_bf16_supported()


def mixed_precision(device: torch.device) -> torch.autocast:
    """bf16 on a GPU that has it, fp32 elsewhere; as the Trainer does for whole models."""
    return torch.autocast(device.type, torch.bfloat16, has_bf16(device.type))


def halve_frozen(model: nn.Module, branch: type[nn.Module] = QRLoRALinear) -> None:
    """Store frozen matrices in bf16: autocast would round them in each step anew, as it caches only what has a
    gradient. The factors `q` and `r` of side branches, which are a `branch`, are rounded with them, coefficients
    are not."""
    for module in model.modules():
        names = [name for name, tensor in module.named_parameters(recurse=False) if tensor.requires_grad]
        if isinstance(module, nn.Linear) and not names:
            module.to(torch.bfloat16)
        elif isinstance(module, branch):
            module.q, module.r = module.q.bfloat16(), module.r.bfloat16()
