"""What metrics of many customers at once share."""

from collections.abc import Sequence

import numpy as np


def divided(shares: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """`shares / wholes` fp64, element by element; 0 where there is nothing to divide by."""
    found: np.ndarray = np.divide(shares, wholes, out=np.zeros(np.shape(shares)), where=wholes > 0)
    return found


def named_scores(names: Sequence[str], *columns: np.ndarray) -> list[dict[str, float]]:
    """One dictionary a customer.

    Args:
        names: of the metrics.
        columns: `[customers]` of each metric, in the same order.
    """
    return [dict(zip(names, map(float, row), strict=True)) for row in zip(*columns, strict=True)]
