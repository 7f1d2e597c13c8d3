"""Which columns QR with column pivoting chooses, for a batch of matrices at once.

The pivots of QR are those of a diagonally pivoted Cholesky of the Gram matrix `W^T W` (Higham, "Accuracy and
Stability of Numerical Algorithms", 10.3): after j steps the diagonal of what is left of the Gram matrix holds the
squared norms of the columns' residuals. A Gram matrix has half of the digits of its weight, so a stage of the
Cholesky ends where the squared norms have lost half of theirs, and the next one begins with the Gram matrix of
the residual itself. That is what LAPACK's geqp3 does column by column when it computes a norm afresh (Drmac and
Bujanovic, ACM TOMS 35, 2008).
"""

import math

import torch

from qrlora_deploy.pivoted_qr.orthonormal import orthonormal
from qrlora_deploy.pivoted_qr.panel import panel_steps

PANEL = 64
"""Steps between two updates of the whole Gram matrix, each of them one GEMM. A step reads the steps before it in
its panel, an update reads and writes everything: on an H200, 32 and 128 are both slower at 4096 columns."""

STAGE_DROP = 1e-8
"""Squared residual norms below this share of a stage's largest are computed afresh: downdating
loses as many digits as they shrink, and 1e-8 leaves eight of sixteen."""

COMPACT_AT = 0.75
"""The Gram matrix is rewritten without the columns that were chosen when this share of it is left: each rewriting
costs about as much as an update, and updates of chosen columns are wasted."""


def pivot_order(weights: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `steps` pivots of `weights [batch, out, in]` fp64.

    Returns:
        Pivots `[batch, steps]` int64 and the diagonal of R `[batch, steps]`, zero past the numerical rank.
    """
    pivots, squares, accepted = _cholesky(weights.mT @ weights, steps)
    diagonal = squares.clamp_min(0).sqrt()
    for row in (accepted < steps).nonzero().flatten().tolist():
        done = int(accepted[row])
        pivots[row], diagonal[row] = _finish(weights[row], pivots[row, :done], diagonal[row, :done], steps)
    return pivots, diagonal


def _finish(
    weight: torch.Tensor, pivots: torch.Tensor, diagonal: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Continue an order that ran out of digits, from the residual of the columns chosen so far."""
    noise = float(weight.norm(dim=0).max()) * torch.finfo(torch.float64).eps * min(weight.shape)
    while len(pivots) < steps:
        rest = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        rest[pivots] = False
        columns = rest.nonzero().flatten()
        residual = _residual(weight[:, pivots], weight[:, columns])
        if float(residual.norm(dim=0).max()) <= noise:
            pivots = torch.cat([pivots, columns])[:steps]
            return pivots, torch.cat([diagonal, diagonal.new_zeros(steps - len(diagonal))])
        more, squares, accepted = _cholesky((residual.mT @ residual)[None], steps - len(pivots))
        count = int(accepted[0])
        pivots = torch.cat([pivots, columns[more[0, :count]]])
        diagonal = torch.cat([diagonal, squares[0, :count].sqrt()])
    return pivots, diagonal


def _residual(chosen: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """What is left of `others [out, n]` without the span of `chosen [out, m]`."""
    if chosen.shape[1] == 0:
        return others
    q = orthonormal(chosen[None])[0]
    once = others - q @ (q.mT @ others)
    return once - q @ (q.mT @ once)  # once is not enough: Giraud et al. 2005


def _cholesky(gram: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Diagonal pivots of a batch of Gram matrices `[batch, n, n]`, which are overwritten.

    Returns:
        Pivots `[batch, steps]`, the squared residual norm of each `[batch, steps]`, and how many of each row are
        accurate `[batch]`: at least 1 unless the matrix is zero.
    """
    batch, n, _ = gram.shape
    residual = gram.diagonal(dim1=1, dim2=2).clone()
    floor = residual.amax(dim=1) * STAGE_DROP
    columns = torch.arange(n, device=gram.device).expand(batch, n)
    pivots = torch.zeros(batch, steps, dtype=torch.long, device=gram.device)
    squares = torch.zeros(batch, steps, dtype=torch.float64, device=gram.device)
    for start in range(0, steps, PANEL):
        if n - start <= COMPACT_AT * gram.shape[1]:
            if bool((squares[:, start - 1] <= floor).all()):
                break
            gram, residual, columns = _without_chosen(gram, residual, columns)
        width = min(PANEL, steps - start)
        panel, chosen, squares[:, start : start + width] = panel_steps(gram, residual, floor, width)
        pivots[:, start : start + width] = columns.gather(1, chosen)
        gram.baddbmm_(panel.mT, panel, alpha=-1)
    return pivots, squares, (squares > floor[:, None]).long().cumprod(dim=1).sum(dim=1)


def _without_chosen(
    gram: torch.Tensor, residual: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = (residual > -math.inf).nonzero()[:, 1].view(len(gram), -1)
    left = keep.shape[1]
    rows = gram.gather(1, keep[:, :, None].expand(-1, -1, gram.shape[2]))
    return rows.gather(2, keep[:, None].expand(-1, left, -1)), residual.gather(1, keep), columns.gather(1, keep)
