"""Which columns QR with column pivoting chooses, for a batch of matrices at once.

The pivots of QR are those of a diagonally pivoted Cholesky of the Gram matrix `W^T W` (Higham, "Accuracy and
Stability of Numerical Algorithms", 10.3): after j steps the diagonal of what is left of the Gram matrix holds the
squared norms of the columns' residuals. A Gram matrix has half of the digits of its weight, so a stage of the
Cholesky ends where the squared norms have lost half of theirs, and the next one begins with the Gram matrix of
the residual itself. That is what LAPACK's geqp3 does column by column when it computes a norm afresh (Drmac and
Bujanovic, ACM TOMS 35, 2008).
"""

import math
from dataclasses import dataclass

import torch

from qrlora_deploy.factorization.pivoted_qr.panel import panel_steps

PANEL = 64
"""Steps between two updates of the whole Gram matrix, each of them one GEMM. A step reads the steps before it in
its panel, an update reads and writes everything: on an H200, 32 and 128 are both slower at 4096 columns."""

STAGE_DROP = 1e-8
"""Squared residual norms below this share of a stage's largest are computed afresh: downdating
loses as many digits as they shrink, and 1e-8 leaves eight of sixteen."""

COMPACT_AT = 0.75
"""The Gram matrix is rewritten without the columns that were chosen when this share of it is left: each rewriting
costs about as much as an update, and updates of chosen columns are wasted."""

REFINEMENTS = 3
"""Times that a residual is projected: by the normal equations each time gains at least four digits."""

ORTHOGONAL = 1e-13
"""Largest product of a residual with a column that it was freed of, relative to both before: rounding, with room for
sums of thousands of products. Beyond it QR takes over."""


def pivot_order(weights: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `steps` pivots of `weights [batch, out, in]` fp64.

    Returns:
        Pivots `[batch, steps]` int64 and the diagonal of R `[batch, steps]`, zero past the numerical rank.
    """
    batch, out, width = weights.shape
    noise = weights.norm(dim=1).amax(dim=1) * torch.finfo(torch.float64).eps * min(out, width)
    order = _Order.empty(batch, steps, width, weights.device)
    members = torch.arange(batch, device=weights.device)
    residual, columns = weights, torch.arange(width, device=weights.device).expand(batch, width)
    while len(members):
        left = steps - int(order.done[members].min())
        stage = _cholesky(residual.mT @ residual, min(left, residual.shape[2]), noise[members].square())
        order.append(members, stage, columns)
        # Where a stage accepts nothing, only noise is left.
        unfinished = (order.done[members] < steps) & (stage.accepted > 0)
        rows = unfinished.nonzero().flatten()
        if len(rows):
            residual, columns = _residual(residual[rows], columns[rows], stage.of(rows))
        members = members[rows]
    order.fill_up()
    return order.pivots, order.diagonal


@dataclass(frozen=True)
class _Stage:
    """Pivots `[batch, steps]` among a stage's columns, squared residual norms `[batch, steps]`, and how many are
    accurate `[batch]`."""

    pivots: torch.Tensor
    squares: torch.Tensor
    accepted: torch.Tensor

    def of(self, rows: torch.Tensor) -> "_Stage":
        """That of some members, without the steps that none of them accepts."""
        count = int(self.accepted[rows].max())
        return _Stage(self.pivots[rows, :count], self.squares[rows, :count], self.accepted[rows])


@dataclass(frozen=True)
class _Order:
    """What all stages have chosen: `pivots` and `diagonal [batch, steps]`, of which `done [batch]` are there, and
    which of all columns they are, `chosen [batch, in]`."""

    pivots: torch.Tensor
    diagonal: torch.Tensor
    done: torch.Tensor
    chosen: torch.Tensor

    @classmethod
    def empty(cls, batch: int, steps: int, width: int, device: torch.device) -> "_Order":
        return cls(
            torch.zeros(batch, steps, dtype=torch.long, device=device),
            torch.zeros(batch, steps, dtype=torch.float64, device=device),
            torch.zeros(batch, dtype=torch.long, device=device),
            torch.zeros(batch, width, dtype=torch.bool, device=device),
        )

    def append(self, members: torch.Tensor, stage: _Stage, columns: torch.Tensor) -> None:
        """Write what a stage of some `members` accepted behind what they have; `columns` names its columns."""
        steps = torch.arange(stage.pivots.shape[1], device=members.device)
        place = self.done[members, None] + steps
        wanted = (steps < stage.accepted[:, None]) & (place < self.pivots.shape[1])
        row, step = wanted.nonzero(as_tuple=True)
        found = columns.gather(1, stage.pivots)[row, step]
        self.pivots[members[row], place[row, step]] = found
        self.diagonal[members[row], place[row, step]] = stage.squares[row, step].sqrt()
        self.chosen[members[row], found] = True
        self.done[members] += wanted.sum(dim=1)

    def fill_up(self) -> None:
        """Behind the numerical rank any order will do: the columns that are left, as they come."""
        for row in (self.done < self.pivots.shape[1]).nonzero().flatten().tolist():
            done = int(self.done[row])
            rest = (~self.chosen[row]).nonzero().flatten()
            self.pivots[row, done:] = rest[: self.pivots.shape[1] - done]


def _cholesky(gram: torch.Tensor, steps: int, noise: torch.Tensor) -> _Stage:
    """A stage: diagonal pivots of a batch of Gram matrices `[batch, n, n]`, which are overwritten.

    Accepted are squared norms above `noise [batch]` and above the share `STAGE_DROP` of the first.
    """
    batch, n, _ = gram.shape
    residual = gram.diagonal(dim1=1, dim2=2).clone()
    floor = torch.maximum(residual.amax(dim=1) * STAGE_DROP, noise)
    columns = torch.arange(n, device=gram.device).expand(batch, n)
    pivots = torch.zeros(batch, steps, dtype=torch.long, device=gram.device)
    squares = torch.zeros(batch, steps, dtype=torch.float64, device=gram.device)
    for start in range(0, steps, PANEL):
        if start and bool((squares[:, start - 1] <= floor).all()):
            break
        if n - start <= COMPACT_AT * gram.shape[1]:
            gram, residual, columns = _without_chosen(gram, residual, columns)
        width = min(PANEL, steps - start)
        panel, chosen, squares[:, start : start + width] = panel_steps(gram, residual, floor, width)
        pivots[:, start : start + width] = columns.gather(1, chosen)
        gram.baddbmm_(panel.mT, panel, alpha=-1)
    return _Stage(pivots, squares, (squares > floor[:, None]).long().cumprod(dim=1).sum(dim=1))


def _without_chosen(
    gram: torch.Tensor, residual: torch.Tensor, columns: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keep = (residual > -math.inf).nonzero()[:, 1].view(len(gram), -1)
    left = keep.shape[1]
    rows = gram.gather(1, keep[:, :, None].expand(-1, -1, gram.shape[2]))
    return rows.gather(2, keep[:, None].expand(-1, left, -1)), residual.gather(1, keep), columns.gather(1, keep)


def _residual(current: torch.Tensor, columns: torch.Tensor, stage: _Stage) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of `current [batch, out, n]` without the columns that its stage accepted, and their names.

    The members need not have accepted equally many: those with fewer columns left get columns of zeros, which no
    stage accepts, and those that accepted fewer are freed of columns of zeros besides.
    """
    taken = torch.arange(stage.pivots.shape[1], device=current.device) < stage.accepted[:, None]
    chosen = torch.zeros(columns.shape, dtype=torch.bool, device=current.device)
    chosen.scatter_(1, stage.pivots, taken)
    left = int((~chosen).sum(dim=1).max())
    rest = chosen.to(torch.int8).argsort(dim=1, stable=True)[:, :left]
    span = _columns(current, stage.pivots) * taken[:, None]
    others = _columns(current, rest) * ~chosen.gather(1, rest)[:, None]
    return _freed(others, span, taken), columns.gather(1, rest)


def _columns(matrices: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return matrices.gather(2, index[:, None].expand(-1, matrices.shape[1], -1))


def _freed(others: torch.Tensor, span: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """`others [batch, out, n]` freed of the span of `span [batch, out, m]`, whose columns are zero where not `taken`.

    By the corrected semi-normal equations (Bjorck, "Numerical Methods for Least Squares Problems", 6.6.5): no Q is
    needed, and the stage's bound on its diagonal keeps the span well conditioned.
    """
    gram = span.mT @ span
    gram.diagonal(dim1=1, dim2=2).add_((~taken).double())
    lower, info = torch.linalg.cholesky_ex(gram)
    free = others
    for _ in range(REFINEMENTS):
        weights = torch.linalg.solve_triangular(lower, span.mT @ free, upper=False)
        weights = torch.linalg.solve_triangular(lower.mT, weights, upper=True)
        free = torch.baddbmm(free, span, weights, alpha=-1)
    left = (span.mT @ free).abs().amax(dim=(1, 2))
    scale = span.norm(dim=1).amax(dim=1) * others.norm(dim=1).amax(dim=1)
    # Written so that NaN counts as wrong, too.
    wrong = (info != 0) | ~(left <= ORTHOGONAL * scale)
    for row in wrong.nonzero().flatten().tolist():
        q = torch.linalg.qr(span[row][:, taken[row]])[0]
        once = others[row] - q @ (q.mT @ others[row])
        free[row] = once - q @ (q.mT @ once)  # once is not enough: Giraud et al. 2005
    return free
