"""The panel of `panel` as one Triton kernel: one program for each matrix, no launch for each step.

A step depends on the one before it, so what takes time is latency: in plain PyTorch ten launches, here a
reduction over the program's threads and the reading of at most 63 earlier rows, which lie in the caches. The
residual stays in registers for the whole panel.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LARGEST = 32768
"""Columns at most: a program holds the residual and the new row in its registers."""

WARP_COLUMNS = 64
"""Columns for each warp, two for a thread, up to the 32 warps that a program can have."""

REGISTERS = 32768
"""Elements of earlier rows that are read at once, which hides the time of reading them."""


@triton.jit
def _panel(  # type: ignore[no-untyped-def]
    gram, residual, floor, panel, pivots, squares, n, width, BLOCK: tl.constexpr, UNROLL: tl.constexpr
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    gram += matrix * n * n
    residual += matrix * n
    panel += matrix * width * n
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    left = tl.load(residual + columns, mask=inside, other=-float("inf"))
    low = tl.load(floor + matrix)
    for step in range(width):
        largest = tl.max(left, axis=0)
        pivot = tl.min(tl.where(left == largest, columns, BLOCK), axis=0)
        tl.store(pivots + matrix * width + step, pivot.to(tl.int64))
        tl.store(squares + matrix * width + step, largest)
        row = tl.load(gram + pivot.to(tl.int64) * n + columns, mask=inside, other=0.0)
        for block in range(0, step, UNROLL):
            for offset in tl.static_range(UNROLL):
                earlier = block + offset
                factor = tl.load(panel + earlier * n + pivot, mask=earlier < step, other=0.0)
                row -= factor * tl.load(panel + earlier * n + columns, mask=inside & (earlier < step), other=0.0)
        row = tl.where(largest > low, row / tl.sqrt(largest), 0.0)
        tl.store(panel + step * n + columns, row, mask=inside)
        left = tl.where(columns == pivot, -float("inf"), left - row * row)
        # The next step reads an element of this row that another thread wrote.
        tl.debug_barrier()
    tl.store(residual + columns, left, mask=inside)


def launch(
    gram: torch.Tensor,
    residual: torch.Tensor,
    floor: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
) -> None:
    """Fill `out`, the rows, pivots and residuals of `panel_steps`, for at most `LARGEST` columns."""
    panel, pivots, squares = out
    batch, width, n = panel.shape
    block = triton.next_power_of_2(n)
    options: dict[str, Any] = {
        "BLOCK": block,
        "UNROLL": max(1, min(8, REGISTERS // block)),
        "num_warps": max(1, min(32, block // WARP_COLUMNS)),
    }
    with torch.cuda.device_of(gram):
        _panel[(batch,)](gram, residual, floor, panel, pivots, squares, n, width, **options)
