"""Which tokens may be drawn, how likely they are, and which one is: of a whole vocabulary little is looked at.

Probabilities are those of fp64, to some 1e-12: only what adds up to next to nothing is computed in fp32.
"""

import math
from dataclasses import dataclass

import numpy as np

SORTED = 1024
"""Best tokens that are sorted first for top-p; eight times as many each time that they do not hold enough."""

NEARLY_NOTHING = -16.0
"""Logits so far below the best one, over the temperature, have weights of 1e-7, whose sum is well known in fp32."""

DEPTH = 64
"""One value in so many is looked at to find out about how large the best ones are."""

BLOCK = 256
"""Weights that are summed up before they are looked at one by one."""


@dataclass(frozen=True)
class Filters:
    """What bounds the tokens that may be drawn, in this order.

    Attributes:
        top_k: keep so many best tokens; 0 keeps all. Of equal ones the lower ids are better.
        top_p: keep the best tokens until their probabilities reach this sum.
        min_p: keep tokens of at least this share of the best one's probability.
    """

    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def keep_all(self) -> bool:
        """Whether every token may be drawn."""
        return not self.top_k and self.top_p == 1 and not self.min_p


def draw(logits: np.ndarray, temperature: float, filters: Filters, share: float) -> int:
    """The token, ids rising, where the sum of probabilities passes `share`, in [0, 1)."""
    if filters.keep_all:
        return _place(np.exp(_scaled(logits, temperature).astype(np.float32)), share)
    ids, probabilities = candidates(logits, temperature, filters)
    place = np.searchsorted(probabilities.cumsum(), share, side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def candidates(logits: np.ndarray, temperature: float, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that may be drawn, their ids rising, and their probabilities fp64, whose sum is 1."""
    if 0 < filters.top_k < len(logits):
        ids = best(logits, filters.top_k)
        kept, probabilities = _bounded(_scaled(logits[ids], temperature), filters)
        return ids[kept], probabilities
    return _bounded(_scaled(logits, temperature), filters)


def best(values: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest values, rising; of equal ones the first."""
    places = np.flatnonzero(values >= _reached(values, count))
    found = values[places]
    least = np.partition(found, len(found) - count)[len(found) - count]
    above, equal = places[found > least], places[found == least]
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))


def log_sum(logits: np.ndarray) -> float:
    """The log of the sum of all exponentials."""
    return float(logits.max()) + math.log(_sum(_scaled(logits, 1.0)))


def _scaled(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logs of weights, fp64, the best one's being 0."""
    values = logits.astype(np.float64)
    values -= values.max()
    if temperature != 1:
        # A tiny temperature leaves the best ones alone.
        with np.errstate(over="ignore"):
            values /= temperature
    return values


def _bounded(scaled: np.ndarray, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
    """The places that top-p and min-p keep, rising, and their probabilities."""
    if filters.top_p < 1:
        places = _nucleus(scaled, filters.top_p)
    elif filters.min_p > 0:
        # A little more than are kept, by their logs; then their weights decide.
        places = np.flatnonzero(scaled >= math.log(filters.min_p) - 1e-6)
    else:
        places = np.arange(len(scaled))
    weights = np.exp(scaled[places])
    if filters.min_p > 0:
        likely = weights >= filters.min_p * weights.max()
        places, weights = places[likely], weights[likely]
    return places, weights / weights.sum()


def _nucleus(scaled: np.ndarray, share: float) -> np.ndarray:
    """Places, rising, of the best ones whose sum reaches `share`; of equal ones the first are better."""
    total, count = _sum(scaled), SORTED
    while count < len(scaled):
        # Sorting a whole vocabulary takes longer than all the rest.
        places = best(scaled, count)
        probabilities = np.exp(scaled[places]) / total
        if probabilities.sum() > share:
            break
        count *= 8
    else:
        places, probabilities = np.arange(len(scaled)), np.exp(scaled) / total
    # Stable: of equal ones the first stays the first.
    order = np.argsort(-probabilities, kind="stable")
    ordered = probabilities[order]
    return np.sort(places[order[ordered.cumsum() - ordered < share]])


def _sum(scaled: np.ndarray) -> float:
    """Of all weights."""
    much = scaled > NEARLY_NOTHING
    little = np.exp(scaled.astype(np.float32))
    little[much] = 0
    return float(np.exp(scaled[much]).sum()) + float(little.sum(dtype=np.float64))


def _reached(values: np.ndarray, count: int) -> float:
    """A number that at least `count` values reach, and not many more."""
    width = len(values) // DEPTH
    if width < count:
        return -math.inf
    tops = values[: width * DEPTH].reshape(DEPTH, width).max(axis=0)
    return float(np.partition(tops, width - count)[width - count])


def _place(weights: np.ndarray, share: float) -> int:
    """Where the sum of weights passes a share of the whole sum; never at a weight of nothing."""
    whole = len(weights) // BLOCK * BLOCK
    sums = weights[:whole].reshape(-1, BLOCK).sum(axis=1).astype(np.float64)
    sums = np.append(sums, weights[whole:].sum(dtype=np.float64)).cumsum()
    wanted = share * sums[-1]
    block = int(np.searchsorted(sums, wanted, side="right"))
    inside = weights[block * BLOCK : (block + 1) * BLOCK]
    place = int(
        np.searchsorted(inside.cumsum(dtype=np.float64), wanted - (sums[block - 1] if block else 0.0), side="right")
    )
    # A block's sum is rounded otherwise than the sums within.
    return block * BLOCK + min(place, int(np.flatnonzero(inside)[-1]))
