"""The number format inside a graph; at the door every precision has the inputs and outputs of fp32."""

from typing import Any

import torch

from exporters.onnx.customer_rows import CustomerRows
from exporters.onnx.switchable import TableBranch
from qrlora_deploy.errors import QrloraError, argument

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float32}
"""What weights, factors and activations are when the graph is traced, by the name of each of `options.PRECISIONS`;
int8 quantises the fp32 graph."""


def cast_inside(model: Any, rows: CustomerRows | None, precision: str) -> None:
    """Make a model what is traced for `precision`, in place: its weights and factors are rounded once to the dtype.

    For int8 nothing is rounded yet, but branches are prepared for it.

    The model is cast, not the graph: so its own code chooses the constants that depend on the
    dtype, such as the smallest number in an attention mask, and what it computes in fp32 on purpose
    (buckets of positions, the inside of LayerNorm) stays fp32.

    Args:
        model: in fp32, merged already or with its side branches.
        rows: of a switchable model. Tables stay fp32; a gathered row is cast.

    Raises:
        QrloraError: some weights are out of the range of the dtype; all are counted, the first named.
    """
    if precision == "int8":
        for branch in filter(lambda module: isinstance(module, TableBranch), model.modules()):
            branch.by_token = True
    dtype = DTYPES[precision]
    if dtype == torch.float32:
        return
    largest = torch.finfo(dtype).max
    wrong = [name for name, weight in model.named_parameters() if bool((weight.abs() > largest).any())]
    if wrong:
        raise QrloraError(
            f"{len(wrong)} weights are larger than {precision} can hold ({largest:.4g}): "
            f"{', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}; choose another {argument('precision')}"
        )
    model.to(dtype)
    model.config.dtype = dtype
    if rows is not None:
        rows.dtype = dtype
