"""Orthonormal columns with the same leading spans, by products of matrices where that is accurate."""

import torch

BLOCK = 256
"""Columns that are made orthonormal together: enough for an efficient GEMM, few enough to be well conditioned."""

ROUNDING = 4e-15
"""Largest element of `Q^T Q - I`, for each square root of a block's columns, that is taken as rounding alone."""

CORRECTIONS = 3
"""At most, each squaring the error, so that from 1e-3 two are enough."""

USABLE = 1e-2
"""Largest error from which corrections are begun; beyond it Householder QR is the faster and safer way."""


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """`Q [batch, m, n]` of the QR factorization of `columns [batch, m, n]` fp64, m >= n, signs aside.

    Block Gram-Schmidt, twice (Barlow and Smoktunowicz, Numer. Math. 123, 2013), with Cholesky QR inside the blocks.
    Everything is GEMMs, and upper triangular factors keep the leading spans. In the order of QR's pivots the columns
    of a block are well conditioned once they are free of earlier ones, whatever the condition of the matrix; where
    they are not, Householder QR takes over for that matrix.
    """
    q = torch.empty_like(columns)
    failed = torch.zeros(len(columns), dtype=torch.bool, device=columns.device)
    for start in range(0, columns.shape[2], BLOCK):
        block = slice(start, start + BLOCK)
        q[:, :, block], wrong = _orthonormal_block(columns[:, :, block], q[:, :, :start])
        failed |= wrong
    for row in failed.nonzero().flatten().tolist():
        q[row] = torch.linalg.qr(columns[row])[0]
    return q


def _orthonormal_block(block: torch.Tensor, earlier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A block `[batch, m, b]`, orthonormal and orthogonal to `earlier [batch, m, j]`, and for which it failed.

    Cholesky QR has the error `condition^2 * eps`. With `Q^T Q = I + E` the factor of a second one would be `I + U` to
    first order, U being the upper half of E with half of its diagonal, so `Q - Q U` has the error `E^2`.
    """
    free = _project(_normed(block), earlier)
    free = _normed(free)
    lower, info = torch.linalg.cholesky_ex(free.mT @ free)
    failed = info != 0
    q = torch.linalg.solve_triangular(lower.mT, free, upper=True, left=False)
    # The division has enlarged what was left of the earlier columns.
    q = _project(q, earlier)
    bound = ROUNDING * block.shape[2] ** 0.5
    for correction in range(CORRECTIONS + 1):
        error = q.mT @ q
        error.diagonal(dim1=1, dim2=2).sub_(1)
        worst = error.abs().amax(dim=(1, 2))
        # Written so that NaN fails, too.
        failed = failed | ~(worst <= (USABLE if correction < CORRECTIONS else bound))
        if bool((failed | (worst <= bound)).all()):
            break
        error.diagonal(dim1=1, dim2=2).mul_(0.5)
        q = q - q @ error.triu_()
    return q, failed


def _normed(columns: torch.Tensor) -> torch.Tensor:
    return columns / columns.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


def _project(columns: torch.Tensor, earlier: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(columns, earlier, earlier.mT @ columns, alpha=-1) if earlier.shape[2] else columns
