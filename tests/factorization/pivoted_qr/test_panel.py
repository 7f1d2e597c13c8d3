"""A panel against the definition, step by step, and the kernel against the plain loop."""

import math

import numpy as np
import pytest
import torch

from qrlora_deploy.factorization.pivoted_qr.panel import panel_steps

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
"""Elements of a Cholesky factor of well-conditioned matrices of order 100: sums in another order."""


def problem(n: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gram matrices of two matrices, one of them of rank 3, their diagonals and floors."""
    generator = torch.Generator().manual_seed(n)
    full = torch.randn(n + 5, n, generator=generator, dtype=torch.float64)
    low = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    low = low @ torch.randn(3, n, generator=generator, dtype=torch.float64)
    gram = torch.stack([full.T @ full, low.T @ low]).to(device)
    residual = gram.diagonal(dim1=1, dim2=2).clone()
    return gram, residual, residual.amax(dim=1) * 1e-8


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("n", "width"), [(5, 4), (70, 20), (130, 64)])
def test_a_panel_takes_the_largest_residual_and_its_row(n: int, width: int, device: str) -> None:
    gram, residual, floor = problem(n, device)
    rows, pivots, squares = (part.cpu().numpy() for part in panel_steps(gram, residual, floor, width))
    left = gram[0].cpu().numpy().copy()
    for step in range(width):
        pivot = int(np.argmax(np.diag(left) - 1e30 * np.isin(np.arange(n), pivots[0, :step])))
        assert pivots[0, step] == pivot
        np.testing.assert_allclose(squares[0, step], left[pivot, pivot], **CLOSE)
        np.testing.assert_allclose(rows[0, step], left[pivot] / math.sqrt(left[pivot, pivot]), **CLOSE)
        left -= np.outer(left[pivot], left[pivot]) / left[pivot, pivot]
    chosen = np.isin(np.arange(n), pivots[0])
    assert np.isneginf(residual[0].cpu().numpy()[chosen]).all()
    np.testing.assert_allclose(residual[0].cpu().numpy()[~chosen], np.diag(left)[~chosen], **CLOSE)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_ran_out_of_digits_changes_nothing(device: str) -> None:
    gram, residual, floor = problem(70, device)
    rows, pivots, squares = panel_steps(gram, residual, floor, 20)
    assert bool((squares[1, :3] > floor[1]).all()) and bool((squares[1, 3:] <= floor[1]).all())
    assert bool((rows[1, 3:] == 0).all()) and bool((rows[1, :3] != 0).any(dim=1).all())
    assert len(set(pivots[1].tolist())) == 20, "a column is chosen once, also among zeros"
