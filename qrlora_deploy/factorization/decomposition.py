"""Pivoted QR of weight matrices, and the update formula. docs/factorization.md explains the algorithm on GPUs.

For `W [out, in]`, QR with column pivoting gives `W P = Q R` with `|R_11| >= |R_22| >= ...`
(Golub and Van Loan, "Matrix Computations", 5.4.2). Here `R` has its columns back in the order of
`W`, so `W = Q @ R`. Source of the method: Liang and Bharadwaj, "QR-LoRA", arXiv 2508.21810.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.pivoted_qr.order import pivot_order
from qrlora_deploy.factorization.pivoted_qr.orthonormal import orthonormal


def update(q: Any, c: Any, r: Any) -> Any:
    """`ΔW = Q diag(c) R`, the one copy of the formula; numpy and torch both run it.

    Args:
        q: `[out, rank]`.
        c: `[rank]`.
        r: `[rank, in]`.
    """
    return (q * c) @ r


@dataclass(frozen=True)
class Factorization:
    """`W = q @ r` in fp64 with k = min(out, in).

    Attributes:
        q: `[out, k]`, orthonormal columns.
        r: `[k, in]`, columns in the order of `W`; upper triangular in the order of `pivots`.
        pivots: `[k]`, the columns of `W` in the order they were chosen.
        diagonal: `[k]`, non-negative, not increasing.
    """

    q: np.ndarray
    r: np.ndarray
    pivots: np.ndarray
    diagonal: np.ndarray


def factorize_weight(weight: np.ndarray) -> Factorization:
    """Pivoted QR of `weight [out, in]` by LAPACK's geqp3 in fp64.

    Raises:
        InputError: the weight is not a finite, non-empty matrix.
    """
    _check_weight(weight.shape, bool(np.isfinite(weight).all()))
    q, r, pivots = scipy.linalg.qr(weight.astype(np.float64), mode="economic", pivoting=True)
    k = min(weight.shape)
    ordered = np.empty_like(r)
    ordered[:, pivots] = r
    pivots = pivots[:k]
    diagonal = ordered[np.arange(k), pivots]
    signs = np.where(diagonal < 0, -1.0, 1.0)
    return Factorization(q * signs, ordered * signs[:, None], pivots, np.abs(diagonal))


def diagonal_of(weight: np.ndarray) -> np.ndarray:
    """`factorize_weight(weight).diagonal`, to the bit, without forming Q.

    Raises:
        InputError: as `factorize_weight`.
    """
    _check_weight(weight.shape, bool(np.isfinite(weight).all()))
    r, _ = scipy.linalg.qr(weight.astype(np.float64), mode="r", pivoting=True)
    return np.abs(np.diag(r))


def diagonals_of(weights: torch.Tensor) -> np.ndarray:
    """The diagonals `[batch, min(out, in)]` by which `pivoted_qr` asks how much of `weights [batch, out, in]` to form.

    Raises:
        InputError: as `factorize_weight`.
    """
    _check_weight(tuple(weights.shape[1:]), bool(weights.isfinite().all()))
    return pivot_order(weights.to(torch.float64), min(weights.shape[1:]))[1].cpu().numpy()


@dataclass(frozen=True)
class BatchFactorization:
    """The leading directions of a batch of weights, on the device of the weights, in fp64.

    Attributes:
        q: `[batch, out, rank]`, orthonormal columns.
        r: `[batch, rank, in]`, columns in the order of the weights.
        pivots: `[batch, steps]`, in the order they were chosen.
        diagonal: `[batch, steps]`, non-negative. The first `rank` are those of `r`; behind them are residual
            norms, accurate to eight digits.
    """

    q: torch.Tensor
    r: torch.Tensor
    pivots: torch.Tensor
    diagonal: torch.Tensor


def pivoted_qr(
    weights: torch.Tensor, steps: int | None = None, keep: Callable[[np.ndarray], int] | None = None
) -> BatchFactorization:
    """Pivoted QR of `weights [batch, out, in]` of any floating-point dtype, on their device, in fp64.

    Args:
        weights: one shape, so that a step is the same kernel for all of them.
        steps: pivots to choose, at most and by default min(out, in). Fewer stop early.
        keep: from the diagonals `[batch, steps]`, how many directions to form of each weight. None: all.

    Raises:
        InputError: the weights are not finite, non-empty matrices, or there are no steps.
    """
    _check_weight(tuple(weights.shape[1:]), bool(weights.isfinite().all()))
    limit = min(weights.shape[1:])
    steps = limit if steps is None else min(steps, limit)
    if steps < 1:
        raise InputError(f"a factorization needs at least one step, not {steps}")
    exact = weights.to(torch.float64)
    pivots, diagonal = pivot_order(exact, steps)
    rank = steps if keep is None else keep(diagonal.cpu().numpy())
    leading = pivots[:, None, :rank]
    q = orthonormal(exact.gather(2, leading.expand(-1, exact.shape[1], -1)))
    r = q.mT @ exact
    # Zero in exact arithmetic below the diagonal of the chosen columns.
    index = leading.expand(-1, rank, -1)
    triangle = r.gather(2, index).triu()
    found = triangle.diagonal(dim1=1, dim2=2)
    # A sign that makes the diagonal non-negative; `q_i r_i^T`, and so every update, stays the same.
    signs = torch.where(found < 0, -1.0, 1.0)
    r = r.scatter(2, index, triangle).mul_(signs[:, :, None])
    return BatchFactorization(q.mul_(signs[:, None]), r, pivots, torch.cat([found.abs(), diagonal[:, rank:]], dim=1))


def bytes_of_one(out: int, width: int) -> int:
    """Most bytes of device memory that `pivoted_qr` takes for each weight `[out, width]` of a batch."""
    k = min(out, width)
    # The weight; then a stage's Gram matrix half rewritten, or a residual and what it is freed of; or the factors.
    pivoting = max(2.4 * width**2, 2 * out * width + 2.5 * width**2)
    forming = 2 * out * k + 4 * k * width
    return int(8 * (out * width + max(pivoting, forming)))


def _check_weight(shape: tuple[int, ...], finite: bool) -> None:
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"a weight must be a non-empty matrix, not {list(shape)}")
    if not finite:
        raise InputError("the weight holds NaN or Inf")
