"""The closest coefficients, against NumPy's least squares."""

import numpy as np
import pytest

from qrlora_deploy.factorization.decomposition import update
from qrlora_deploy.formats.basis import BasisTarget
from qrlora_deploy.projection.least_squares import DenseUpdate, LowRankUpdate, hold, transfer
from tests.tolerances import BASIS_FP32

OUT, IN, RANK = 9, 7, 4


def make_target(seed: int, rank: int = RANK) -> BasisTarget:
    """Orthonormal columns and any rows, as fp32 files hold them; the last row is zero."""
    random = np.random.default_rng(seed)
    q = np.linalg.qr(random.normal(size=(OUT, rank)))[0].astype(np.float32)
    r = (random.normal(size=(rank, IN)) * np.logspace(0, -2, rank)[:, None]).astype(np.float32)
    r[-1] = 0
    return BasisTarget("layer", q, r, np.ones(IN, np.float32), "0" * 64)


def solved(target: BasisTarget, delta: np.ndarray) -> np.ndarray:
    """The coefficients of least norm, by LAPACK."""
    columns = [np.outer(target.q[:, i], target.r[i]).ravel() for i in range(target.rank)]
    return np.linalg.lstsq(np.array(columns, dtype=np.float64).T, delta.ravel(), rcond=None)[0]


@pytest.mark.parametrize("seed", range(5))
def test_an_update_is_held_as_least_squares_hold_it(seed: int) -> None:
    random, target = np.random.default_rng(seed + 50), make_target(seed)
    b, a = random.normal(size=(OUT, 3)), random.normal(size=(3, IN))
    delta = 0.5 * b @ a
    expected = solved(target, delta)
    left = delta - update(target.q.astype(np.float64), expected, target.r.astype(np.float64))
    for made in (hold(target, DenseUpdate(delta)), hold(target, LowRankUpdate(b, a, 0.5))):
        # Q is orthonormal to fp32's rounding, so its columns see a little of each other.
        np.testing.assert_allclose(made.values, expected, rtol=1e-4, atol=1e-5)
        assert made.energy == pytest.approx(np.square(delta).sum())
        assert made.energy - made.held == pytest.approx(np.square(left).sum(), rel=1e-5)


def test_what_a_basis_can_hold_comes_back_whole() -> None:
    target, c = make_target(1), np.array([0.3, -2.0, 5.0, 0.0])
    delta = update(target.q.astype(np.float64), c, target.r.astype(np.float64))
    made = hold(target, DenseUpdate(delta))
    np.testing.assert_allclose(made.values, c, rtol=1e-5, atol=1e-6)
    assert made.held == pytest.approx(made.energy)


def test_a_transfer_is_the_projection_of_what_coefficients_do() -> None:
    old, new, c = make_target(2), make_target(3, rank=6), np.random.default_rng(4).normal(size=RANK)
    delta = update(old.q.astype(np.float64), c, old.r.astype(np.float64))
    np.testing.assert_allclose(transfer(old, new) @ c, hold(new, DenseUpdate(delta)).values, rtol=1e-12, atol=1e-15)


def test_an_update_of_nothing_has_no_coefficients() -> None:
    made = hold(make_target(5), LowRankUpdate(np.zeros((OUT, 2)), np.ones((2, IN))))
    np.testing.assert_allclose(made.values, np.zeros(RANK), **BASIS_FP32)
    assert made.energy == made.held == 0
