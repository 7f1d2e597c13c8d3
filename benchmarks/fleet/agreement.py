"""How far two trainings of one customer are apart."""

import numpy as np

BOUND = 1e-3
"""In fp32: sums in another order explain no more."""


def relative_difference(values: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference by the largest value."""
    return float(np.abs(values - expected).max() / np.abs(expected).max())
