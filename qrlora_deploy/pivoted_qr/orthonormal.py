"""Orthonormal columns with the same leading spans, by products of matrices where that is accurate."""

import torch

ROUNDING = 4e-15
"""Largest element of `Q^T Q - I`, for each square root of its columns, that is taken as rounding alone."""

REPEATS = 3
"""Corrections at most: each squares the error, so that from 1e-3 two are enough."""

USABLE = 1e-2
"""Largest error from which corrections are begun; beyond it Householder QR is the faster and safer way."""


def orthonormal(columns: torch.Tensor) -> torch.Tensor:
    """`Q [batch, m, n]` of the QR factorization of `columns [batch, m, n]` fp64, m >= n, signs aside.

    Cholesky QR: `G = C^T C = L L^T`, `Q = C L^-T`. Its error is the square of the columns' condition, times eps,
    so it is followed by corrections: with `Q^T Q = I + E` the factor of a second Cholesky is `I + U` to first order,
    U being the upper half of E with half of its diagonal, and `Q - Q U` has the error `E^2` (Yamamoto et al., ETNA
    44, 2015, do a second Cholesky instead). All of it is GEMMs, and upper triangular factors keep the leading spans.
    Columns whose condition is too high for that go to Householder QR one by one.
    """
    scaled = columns / columns.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    lower, failed = _factor(scaled.mT @ scaled)
    q = _divide(scaled, lower)
    bound = ROUNDING * columns.shape[2] ** 0.5
    for repeat in range(REPEATS + 1):
        error = q.mT @ q
        error.diagonal(dim1=1, dim2=2).sub_(1)
        worst = error.abs().amax(dim=(1, 2))
        failed = failed | ~(worst <= (USABLE if repeat < REPEATS else bound))
        if bool((failed | (worst <= bound)).all()):
            break
        error.diagonal(dim1=1, dim2=2).mul_(0.5)
        q = q - q @ error.triu_()
    for row in failed.nonzero().flatten().tolist():
        q[row] = torch.linalg.qr(columns[row])[0]
    return q


SMALL = 1536
"""Below this many columns the batched routines of the library win, above it one matrix after the other."""


def _factor(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cholesky factors `[batch, n, n]`, and which are none."""
    if gram.shape[2] <= SMALL:
        lower, info = torch.linalg.cholesky_ex(gram)
        return lower, info != 0
    parts = [torch.linalg.cholesky_ex(one) for one in gram]
    return torch.stack([lower for lower, _ in parts]), torch.stack([info for _, info in parts]) != 0


def _divide(columns: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve_triangular(lower.mT, columns, upper=True, left=False)
