"""Thresholds of labels that are decided one by one: where they lie in logits, and which are best."""

from collections.abc import Sequence

import numpy as np

THRESHOLD = 0.5
"""The probability from which on a label applies where nothing else is said."""

LOWEST_CUT, HIGHEST_CUT = -700.0, 30.0
"""Cuts are kept between these, where a probability in fp64 is not 0 and still tells neighbours below 1 apart."""

BEYOND = 0.5
"""How far below the lowest logit a cut lies that lets a label apply to every row."""


def check_thresholds(thresholds: Sequence[float], labels: int) -> None:
    """Make sure that there is a probability for every label, or none at all.

    Raises:
        ValueError: there is another number of them, or one is not between 0 and 1.
    """
    if thresholds and len(thresholds) != labels:
        raise ValueError(f"there are {len(thresholds)} thresholds, but {labels} labels")
    wrong = [value for value in thresholds if not 0 < value < 1]
    if wrong:
        raise ValueError(f"a threshold is a probability between 0 and 1, not {wrong[0]}")


def cuts_of(thresholds: Sequence[float]) -> np.ndarray:
    """`[labels]` fp64: the logits from which on labels apply."""
    values = np.asarray(thresholds, dtype=np.float64)
    found: np.ndarray = np.log(values / (1 - values))
    return found


def best_thresholds(logits: np.ndarray, targets: np.ndarray) -> tuple[float, ...]:
    """For each label the threshold with the largest F1 on these rows.

    Of equally good ones it is the nearest to 0.5, which stays where no other is better, as for a label that no row
    has. A threshold lies in the middle, in logits, between the two rows that it parts.

    Args:
        logits: `[n, labels]`.
        targets: `[n, labels]`, above 0.5 where a label is a row's.
    """
    columns = zip(np.asarray(logits, dtype=np.float64).T, np.asarray(targets).T > 0.5, strict=True)
    cuts = np.array([_best_cut(values, expected) for values, expected in columns])
    return tuple((1 / (1 + np.exp(-np.clip(cuts, LOWEST_CUT, HIGHEST_CUT)))).tolist())


def _best_cut(logits: np.ndarray, expected: np.ndarray) -> float:
    values, places = np.unique(logits, return_inverse=True)
    # By value, from the highest: how many rows reach it, and how many of these have the label.
    reached = np.bincount(places)[::-1].cumsum()
    right = np.bincount(places, weights=expected)[::-1].cumsum()
    scores = 2 * right / (reached + max(1, int(expected.sum())))
    falling = values[::-1]
    cuts = np.append((falling[:-1] + falling[1:]) / 2, falling[-1] - BEYOND)
    half = 2 * (expected & (logits >= 0)).sum() / (int((logits >= 0).sum()) + max(1, int(expected.sum())))
    if scores.max() <= half:
        return 0.0
    best = cuts[scores == scores.max()]
    return float(best[np.abs(best).argmin()])
