"""The number format inside a graph; at the door every precision has the inputs and outputs of fp32."""

from typing import Any

import torch

from exporters.onnx.switchable import CustomerRows
from qrlora_deploy.errors import InputError, ProviderError, QrloraError

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""What weights, factors and activations are when the graph is traced, by the name of the precision;
int8 quantises the fp32 graph."""


def check_precision(precision: str, provider: str, calibrated: bool = False) -> None:
    """Make sure that the precision is a known one, and that the provider is made for it.

    Args:
        calibrated: whether texts to calibrate on were given.

    Raises:
        InputError: it is not; the message lists those that are. Or int8 was asked for on a GPU, or
            there is nothing to calibrate.
        ProviderError: bf16 was asked for on the CPU.
    """
    if precision not in DTYPES:
        raise InputError(f"unknown precision {precision!r}; choose from {', '.join(DTYPES)}")
    if precision == "int8" and provider != "cpu":
        # ONNX Runtime's GPU providers have no kernel for its products and would copy to the CPU for each.
        raise InputError(f"int8 is for the CPU, not --provider {provider}; choose --precision fp16 there")
    if precision == "bf16" and provider == "cpu":
        raise ProviderError(
            "cpu cannot run a graph in bf16: ONNX Runtime has no kernels for it there; export and verify it with "
            "--provider cuda"
        )
    if calibrated and precision != "int8":
        raise InputError(f"--calibration belongs to --precision int8; {precision} has no scales to find")


def cast_inside(model: Any, rows: CustomerRows | None, precision: str) -> None:
    """Round weights and factors once to the dtype of `precision`, in place, before the graph is traced.

    The model is cast, not the graph: so its own code chooses the constants that depend on the
    dtype, such as the smallest number in an attention mask, and what it computes in fp32 on purpose
    (buckets of positions, the inside of LayerNorm) stays fp32.

    Args:
        model: in fp32, merged already or with its side branches.
        rows: of a switchable model. Tables stay fp32; a gathered row is cast.

    Raises:
        QrloraError: some weights are out of the range of the dtype; all are counted, the first named.
    """
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return
    largest = torch.finfo(dtype).max
    wrong = [name for name, weight in model.named_parameters() if bool((weight.abs() > largest).any())]
    if wrong:
        raise QrloraError(
            f"{len(wrong)} weights are larger than {precision} can hold ({largest:.4g}): "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; choose another --precision"
        )
    model.to(dtype)
    model.config.dtype = dtype
    if rows is not None:
        rows.dtype = dtype
