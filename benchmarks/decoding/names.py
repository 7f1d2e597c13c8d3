"""What contenders are called in a record."""

EAGER, STATIC, COMPILED = "torch eager generate", "torch static cache, captured", "torch.compile, static cache"
PEFT = "PEFT, adapter_names"
EAGER_FP32 = "transformers eager fp32"

MANY, FEW = 10_000, 10
"""Customers that are resident."""


def resident(customers: int) -> str:
    """A table of so many customers."""
    return f"{customers} customers"
