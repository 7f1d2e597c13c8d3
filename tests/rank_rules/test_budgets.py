"""Rules that spread directions over all weights, against scipy's pivoted QR in fp64 and their definitions."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.decomposition import diagonal_of
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.energy_budget import EnergyBudget
from qrlora_deploy.rank_rules.even_budget import EvenBudget
from qrlora_deploy.rank_rules.registry import chosen_ranks

RULES: tuple[Callable[[int], RankRule], ...] = (EvenBudget, EnergyBudget)


@st.composite
def weights(draw: st.DrawFn) -> dict[str, np.ndarray]:
    """A few random matrices of different shapes, scales, decays and ranks; now and then a zero one."""
    generator = np.random.default_rng(draw(st.integers(0, 10**6)))
    found = {}
    for number in range(draw(st.integers(1, 5))):
        out, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        rank = draw(st.integers(0, min(out, width)))
        decay = np.logspace(0, -draw(st.integers(0, 3)), max(rank, 1))[:rank]
        weight = generator.normal(size=(out, rank)) * decay @ generator.normal(size=(rank, width))
        found[f"w{number}"] = weight * 10.0 ** draw(st.integers(-8, 8))
    return found


def energies_of(given: dict[str, np.ndarray]) -> list[tuple[str, float]]:
    """By scipy alone: each direction above rounding noise, with its share of its weight's energy."""
    found = []
    for name, weight in given.items():
        _, r, _ = scipy.linalg.qr(weight, pivoting=True)
        energies = np.diag(r) ** 2
        found += [(name, float(e / energies.sum())) for e in energies if e > 1e-24 * energies[0]]
    return found


@settings(deadline=None, max_examples=60)
@given(weights(), st.data())
def test_energy_keeps_the_largest_shares_of_all_weights(given: dict[str, np.ndarray], data: st.DataObject) -> None:
    every = energies_of(given)
    if not every:
        return
    total = data.draw(st.integers(1, len(every)))
    ranks = chosen_ranks(EnergyBudget(total), {name: diagonal_of(weight) for name, weight in given.items()})
    assert sum(ranks.values()) == total
    shares = {name: sorted((s for n, s in every if n == name), reverse=True) for name in given}
    kept = [share for name, rank in ranks.items() for share in shares[name][:rank]]
    left = [share for name, rank in ranks.items() for share in shares[name][rank:]]
    assert min(kept) >= max(left, default=0.0) - 1e-12
    assert len(kept) == total


@settings(deadline=None, max_examples=60)
@given(weights(), st.data())
def test_even_fills_all_weights_alike(given: dict[str, np.ndarray], data: st.DataObject) -> None:
    every = energies_of(given)
    if not every:
        return
    total = data.draw(st.integers(1, len(every)))
    ranks = chosen_ranks(EvenBudget(total), {name: diagonal_of(weight) for name, weight in given.items()})
    assert sum(ranks.values()) == total
    sizes = Counter(name for name, _ in every)
    # Only a weight that is used up may be more than one below another.
    assert all(rank >= max(ranks.values()) - 1 for name, rank in ranks.items() if rank < sizes[name])
    shares = {name: sorted((s for n, s in every if n == name), reverse=True) for name in given}
    low = min((rank for name, rank in ranks.items() if rank < sizes[name]), default=None)
    got = [shares[name][low] for name, rank in ranks.items() if low is not None and rank == low + 1]
    waiting = [shares[name][low] for name, rank in ranks.items() if rank == low and rank < sizes[name]]
    assert not got or not waiting or min(got) >= max(waiting) - 1e-12


@settings(deadline=None, max_examples=20)
@given(weights(), st.integers(-6, 6), st.data())
def test_the_scale_of_a_weight_says_nothing(given: dict[str, np.ndarray], power: int, data: st.DataObject) -> None:
    every = energies_of(given)
    if not every:
        return
    total = data.draw(st.integers(1, len(every)))
    diagonals = {name: diagonal_of(weight) for name, weight in given.items()}
    scaled = {name: value * (2.0**power if name == "w0" else 1.0) for name, value in diagonals.items()}
    for rule in RULES:
        assert rule(total).choose(scaled) == rule(total).choose(diagonals)


@pytest.mark.parametrize("rule", RULES)
def test_more_directions_than_there_are_is_refused_and_all_are_given(rule: Callable[[int], RankRule]) -> None:
    diagonals = {"a": np.array([2.0, 1.0, 0.0]), "b": np.array([3.0]), "zero": np.zeros(2)}
    assert rule(3).choose(diagonals) == {"a": 2, "b": 1, "zero": 0}
    with pytest.raises(InputError, match=r"budget=4 is more than the chosen layers have; give 3 at most"):
        rule(4).choose(diagonals)


def test_even_gives_what_is_left_over_where_the_next_share_is_largest() -> None:
    flat, steep = np.ones(4), np.array([10.0, 1.0, 0.1, 0.01])
    assert EvenBudget(5).choose({"steep": steep, "flat": flat}) == {"steep": 2, "flat": 3}
    assert EvenBudget(1).choose({"flat": flat, "steep": steep}) == {"flat": 0, "steep": 1}
    assert EvenBudget(7).choose({"short": np.ones(1), "flat": flat, "steep": steep}) == {
        "short": 1,
        "flat": 3,
        "steep": 3,
    }
