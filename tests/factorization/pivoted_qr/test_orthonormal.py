"""Orthonormal columns of easy, hard and singular matrices, each with the spans of Householder QR."""

import numpy as np
import pytest
import torch

from qrlora_deploy.factorization.pivoted_qr.orthonormal import orthonormal
from tests.tolerances import ORTHONORMAL

SPANS = {"rtol": 0.0, "atol": 1e-9}
"""`Q^T Q_householder` against a diagonal of signs, at conditions of up to 1e6: condition times eps."""


def columns(condition: float, m: int = 60, n: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    left, right = (
        torch.linalg.qr(torch.randn(size, n, generator=generator, dtype=torch.float64))[0] for size in (m, n)
    )
    return (left * torch.logspace(0, -float(np.log10(condition)), n, dtype=torch.float64)) @ right.T


@pytest.mark.parametrize("condition", [1.0, 1e3, 1e6])
def test_leading_spans_are_those_of_householder(condition: float) -> None:
    matrix = columns(condition)
    q = orthonormal(matrix[None])[0]
    np.testing.assert_allclose(q.T @ q, np.eye(40), **ORTHONORMAL)
    np.testing.assert_allclose((q.T @ torch.linalg.qr(matrix)[0]).abs(), np.eye(40), **SPANS)


def test_a_batch_of_every_kind() -> None:
    """Those that Cholesky cannot factor are done another way, beside those that it can."""
    singular = columns(10.0)
    singular[:, 7] = singular[:, 3]
    zero_column = columns(10.0)
    zero_column[:, 5] = 0
    batch = torch.stack([columns(10.0), columns(1e14), singular, zero_column, torch.zeros(60, 40, dtype=torch.float64)])
    q = orthonormal(batch)
    np.testing.assert_allclose(q.mT @ q, np.broadcast_to(np.eye(40), (5, 40, 40)), **ORTHONORMAL)
    for matrix, its_q in zip(batch, q, strict=True):
        np.testing.assert_allclose(its_q @ (its_q.T @ matrix), matrix, rtol=0, atol=1e-13)


@pytest.mark.parametrize("scale", [1e-150, 1e100])
def test_scales_at_the_ends_of_the_range(scale: float) -> None:
    q = orthonormal(columns(100.0)[None] * scale)[0]
    np.testing.assert_allclose(q.T @ q, np.eye(40), **ORTHONORMAL)
