"""Columns of weights that count by what goes into them."""

from collections.abc import Mapping

import numpy as np
import torch

from qrlora_deploy.errors import InputError

Moments = Mapping[str, np.ndarray]
"""By the target's name the second moment of its inputs, `E[x x^T]` `[in, in]`, symmetric."""


def weighted(weight: torch.Tensor, moment: np.ndarray) -> torch.Tensor:
    """`W E[x x^T]^(1/2)`, whose norm is that of what `W` answers: `||W C^(1/2)||_F^2 = E ||W x||^2`.

    Pivoted QR of it gives `Q R~`, and `Q` is kept with `R = Q^T W`, so that an update is `Q diag(c) R` as ever. Where C
    is regular this R is `R~ C^(-1/2)`, and all directions together give `Q R = W`; where inputs never vary in some
    direction, `Q R` is W on all inputs that there are. R is not triangular.

    Args:
        weight: `[out, in]` of any floating-point dtype.
        moment: `[in, in]`.

    Returns:
        `[out, in]` fp64 on the device of the weight.

    Raises:
        InputError: the moment has another shape than the weight's inputs, or is not finite.
    """
    if moment.shape != (weight.shape[1], weight.shape[1]) or not np.isfinite(moment).all():
        raise InputError(f"the second moment of the inputs must be a finite [{weight.shape[1]}, {weight.shape[1]}]")
    exact = torch.from_numpy(moment).to(weight.device, torch.float64)
    values, vectors = torch.linalg.eigh(exact)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.mT
    return weight.to(torch.float64) @ root
