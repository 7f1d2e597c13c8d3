"""A panel of a diagonally pivoted Cholesky: the steps between two updates of the whole matrix."""

import importlib.util
import math

import torch

SMALLEST = torch.finfo(torch.float64).tiny


def panel_steps(
    gram: torch.Tensor, residual: torch.Tensor, floor: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose `width` pivots of each of a batch of matrices, `gram` being up to date.

    A step takes the largest of `residual`, computes that row of the Cholesky factor from the row of `gram` and the
    steps before it, and subtracts its squares from `residual`.

    Args:
        gram: `[batch, n, n]` fp64, symmetric; only read.
        residual: `[batch, n]` fp64, the diagonal, -inf for columns that were chosen; brought up to date.
        floor: `[batch]`; a step whose largest residual is not above it changes nothing but the choice.
        width: at most the number of columns that are left.

    Returns:
        The rows of the factor `[batch, width, n]`, the pivots `[batch, width]` int64, and the largest residual of
        each step `[batch, width]`.
    """
    panel = gram.new_zeros(len(gram), width, gram.shape[2])
    pivots = torch.zeros(len(gram), width, dtype=torch.long, device=gram.device)
    squares = gram.new_zeros(len(gram), width)
    if gram.is_cuda and importlib.util.find_spec("triton") is not None:
        # Triton comes with PyTorch's builds for CUDA on Linux, and with no other.
        from qrlora_deploy.factorization.pivoted_qr.kernel import LARGEST, launch

        if gram.shape[2] <= LARGEST:
            launch(gram, residual, floor, (panel, pivots, squares))
            return panel, pivots, squares
    rows = torch.arange(len(gram), device=gram.device)
    for step in range(width):
        squares[:, step], pivots[:, step] = residual.max(dim=1)
        largest, pivot = squares[:, step], pivots[:, step]
        earlier = panel[:, :step]
        row = gram[rows, pivot] - (earlier[rows, :, pivot][:, None] @ earlier)[:, 0]
        row = row / largest.clamp_min(SMALLEST).sqrt()[:, None]
        panel[:, step] = torch.where((largest > floor)[:, None], row, 0.0)
        residual -= panel[:, step].square()
        residual[rows, pivot] = -math.inf
    return panel, pivots, squares
