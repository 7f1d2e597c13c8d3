"""Pivoted QR of weight matrices, and the update formula.

For `W [out, in]`, QR with column pivoting gives `W P = Q R` with `|R_11| >= |R_22| >= ...`
(Golub and Van Loan, "Matrix Computations", 5.4.2). Here `R` has its columns back in the order of
`W`, so `W = Q @ R`. Source of the method: Liang and Bharadwaj, "QR-LoRA", arXiv 2508.21810.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import torch

from qrlora_deploy.errors import InputError

PANEL = 64
"""Columns between two trailing updates of the blocked Cholesky; each update is one GEMM."""

STAGE_DROP = 1e-8
"""Squared residual norms below this share of a stage's largest are computed afresh: downdating
loses as many digits as they shrink, and 1e-8 leaves eight of sixteen."""


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

    def energy_of(self, rank: int) -> float:
        """Share of `||R_diag||^2` in the first `rank` directions; 1 for a zero weight."""
        energies = np.square(self.diagonal)
        total = float(energies.sum())
        return float(energies[:rank].sum()) / total if total else 1.0

    def condition_of(self, rank: int) -> float:
        """`|R_11| / |R_rr|`, infinite where the last kept direction is zero."""
        last = float(self.diagonal[rank - 1])
        return float(self.diagonal[0]) / last if last else math.inf


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
    return _positive(q, ordered, pivots[:k])


def factorize_weights(weights: torch.Tensor) -> list[Factorization]:
    """Pivoted QR of `weights [batch, out, in]` on their device, in fp64.

    The pivots come from a blocked, pivoted Cholesky of the Gram matrix (Higham, "Accuracy and
    Stability of Numerical Algorithms", 10.3): its pivots are those of QR, and a step is a few
    batched kernels. The factors come from Householder QR of the chosen columns, so `q` is
    orthonormal to rounding whatever the condition of the weight.

    Raises:
        InputError: as `factorize_weight`.
    """
    _check_weight(tuple(weights.shape[1:]), bool(weights.isfinite().all()))
    exact = weights.to(torch.float64)
    pivots = _pivot_order(exact)
    chosen = exact.gather(2, pivots[:, None, :].expand(-1, exact.shape[1], -1))
    q, _ = torch.linalg.qr(chosen)
    r = q.mT @ exact
    # Zero in exact arithmetic below the diagonal of the chosen columns.
    index = pivots[:, None, :].expand_as(r.gather(2, pivots[:, None, :].expand(-1, r.shape[1], -1)))
    r = r.scatter(2, index, r.gather(2, index).triu())
    return [_positive(*parts) for parts in zip(q.cpu().numpy(), r.cpu().numpy(), pivots.cpu().numpy(), strict=True)]


def _check_weight(shape: tuple[int, ...], finite: bool) -> None:
    if len(shape) != 2 or 0 in shape:
        raise InputError(f"a weight must be a non-empty matrix, not {list(shape)}")
    if not finite:
        raise InputError("the weight holds NaN or Inf")


def _positive(q: np.ndarray, r: np.ndarray, pivots: np.ndarray) -> Factorization:
    """Make the diagonal non-negative; `q_i r_i^T`, and so every update, stays the same."""
    diagonal = r[np.arange(len(pivots)), pivots]
    signs = np.where(diagonal < 0, -1.0, 1.0)
    return Factorization(q * signs, r * signs[:, None], pivots, np.abs(diagonal))


def _pivot_order(weights: torch.Tensor) -> torch.Tensor:
    """Pivots `[batch, k]` of QR with column pivoting of `weights [batch, out, in]` in fp64."""
    k = min(weights.shape[1:])
    pivots, accepted = _cholesky_pivots(weights.mT @ weights, k)
    for row in (accepted < k).nonzero().flatten().tolist():
        pivots[row] = _finish_pivots(weights[row], pivots[row, : int(accepted[row])], k)
    return pivots


def _finish_pivots(weight: torch.Tensor, pivots: torch.Tensor, k: int) -> torch.Tensor:
    """Continue an order that ran out of digits, from the residual of the columns chosen so far."""
    largest = weight.norm(dim=0).max()
    while len(pivots) < k:
        q, _ = torch.linalg.qr(weight[:, pivots])
        residual = weight - q @ (q.mT @ weight)
        residual = residual - q @ (q.mT @ residual)  # once is not enough: Giraud et al. 2005
        residual[:, pivots] = 0
        if residual.norm(dim=0).max() <= largest * torch.finfo(torch.float64).eps * k:
            rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
            rest[pivots] = False
            return torch.cat([pivots, rest.nonzero().flatten()])[:k]
        more, accepted = _cholesky_pivots((residual.mT @ residual)[None], k - len(pivots))
        pivots = torch.cat([pivots, more[0, : int(accepted[0])]])
    return pivots


def _cholesky_pivots(gram: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Diagonal pivots of a batch of Gram matrices `[batch, n, n]`, which are overwritten.

    Returns:
        Pivots `[batch, steps]`, and how many of each row are accurate `[batch]`, at least 1 unless
        the matrix is zero.
    """
    batch, n, _ = gram.shape
    residual = gram.diagonal(dim1=1, dim2=2).clone()
    floor = residual.amax(dim=1) * STAGE_DROP
    pivots = torch.zeros(batch, steps, dtype=torch.long, device=gram.device)
    accepted = torch.zeros(batch, dtype=torch.long, device=gram.device)
    rows = torch.arange(batch, device=gram.device)
    for start in range(0, steps, PANEL):
        width = min(PANEL, steps - start)
        panel = gram.new_zeros(batch, n, width)
        for j in range(width):
            largest, pivot = residual.max(dim=1)
            pivots[:, start + j] = pivot
            accepted += (largest > floor) & (accepted == start + j)
            column = gram[rows, :, pivot] - (panel[:, :, :j] @ panel[rows, pivot, :j, None])[..., 0]
            column = column / largest.clamp_min(torch.finfo(torch.float64).tiny).sqrt()[:, None]
            panel[:, :, j] = column
            residual -= column.square()
            residual[rows, pivot] = -math.inf
        gram -= panel @ panel.mT
    return pivots, accepted
