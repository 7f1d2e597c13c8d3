"""Pivoted QR against LAPACK in fp64.

`pivoted_qr` runs the same code on the CPU as on CUDA, so its algorithm is tested here
without a GPU; the tests marked `gpu` repeat it there.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.factorization.decomposition import (
    Factorization,
    diagonal_of,
    diagonals_of,
    factorize_weight,
    pivoted_qr,
    update,
)
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from tests.rank_rules.ranks import rank_of
from tests.tolerances import ENERGIES, EXACT, ORTHONORMAL, RECONSTRUCTION

EPS = float(np.finfo(np.float64).eps)

TIE = 1e-7
"""Relative distance of two residual norms that counts as a tie: both algorithms downdate norms and
recompute them once about half of the sixteen digits are gone."""


def gaussian(out: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((out, width))


def low_rank(out: int, width: int, rank: int) -> np.ndarray:
    return gaussian(out, rank, 1) @ gaussian(rank, width, 2)


def graded(out: int, width: int, decades: float) -> np.ndarray:
    """Columns that shrink by `decades` powers of ten, shuffled."""
    scales = np.logspace(0, -decades, width)
    return gaussian(out, width, 3) * np.random.default_rng(4).permutation(scales)


def kahan(n: int, angle: float = 1.2) -> np.ndarray:
    """Kahan's matrix: graded, ill-conditioned, all residual norms of a step equal.

    The factor on the columns breaks the ties in favour of the natural order, as in Golub and Van
    Loan, 5.4.3; without it pivoting follows rounding errors.
    """
    sine, cosine = math.sin(angle), math.cos(angle)
    upper = np.triu(np.full((n, n), -cosine), 1) + np.eye(n)
    return np.diag(sine ** np.arange(n)) @ upper * (1 - 1e-5) ** np.arange(n)


def with_singular_values(out: int, width: int, values: np.ndarray) -> np.ndarray:
    left = np.linalg.qr(gaussian(out, len(values), 5))[0]
    right = np.linalg.qr(gaussian(width, len(values), 6))[0]
    return (left * values) @ right.T


MATRICES: dict[str, Callable[[], np.ndarray]] = {
    "square": lambda: gaussian(96, 96),
    "two panels and a rest": lambda: gaussian(150, 140),
    "tall": lambda: gaussian(120, 40),
    "wide": lambda: gaussian(40, 120),
    "one row": lambda: gaussian(1, 7),
    "one column": lambda: gaussian(7, 1),
    "one value": lambda: np.array([[-2.0]]),
    "rank 5 of 60": lambda: low_rank(60, 80, 5),
    "rank 1": lambda: low_rank(30, 20, 1),
    "rank 70, beyond a panel": lambda: low_rank(90, 100, 70),
    "zero": lambda: np.zeros((12, 9)),
    "zero columns": lambda: gaussian(20, 30) * (np.arange(30) % 3 > 0),
    "equal columns": lambda: np.repeat(gaussian(20, 10), 3, axis=1),
    "identity": lambda: np.eye(40),
    "graded over 6 decades": lambda: graded(80, 80, 6),
    "graded over 14 decades": lambda: graded(100, 80, 14),
    "Kahan": lambda: kahan(90),
    "condition 1e12": lambda: with_singular_values(70, 70, np.logspace(0, -12, 70)),
    "a cliff of 1e-9": lambda: with_singular_values(60, 60, np.r_[np.ones(20), np.full(40, 1e-9)]),
    "large": lambda: gaussian(30, 30) * 1e30,
    "small": lambda: gaussian(30, 30) * 1e-38,
}

Algorithm = Callable[[np.ndarray], Factorization]


def by_lapack(weight: np.ndarray) -> Factorization:
    return factorize_weight(weight)


def each(weights: torch.Tensor) -> list[Factorization]:
    found = pivoted_qr(weights)
    parts = (found.q, found.r, found.pivots, found.diagonal)
    return [Factorization(*one) for one in zip(*(part.cpu().numpy() for part in parts), strict=True)]


def by_cholesky(weight: np.ndarray) -> Factorization:
    return each(torch.from_numpy(weight)[None])[0]


def by_cuda(weight: np.ndarray) -> Factorization:
    return each(torch.from_numpy(weight)[None].cuda())[0]


algorithms = pytest.mark.parametrize(
    "algorithm", [by_lapack, by_cholesky, pytest.param(by_cuda, marks=pytest.mark.gpu)]
)


def check(weight: np.ndarray, result: Factorization) -> None:
    """All that is promised of a factorization, against the weight and against LAPACK."""
    k = min(weight.shape)
    largest = float(np.abs(weight).max()) or 1.0
    assert result.q.shape == (weight.shape[0], k)
    assert result.r.shape == (k, weight.shape[1])
    assert result.q.dtype == result.r.dtype == np.float64
    np.testing.assert_allclose(result.q.T @ result.q, np.eye(k), **ORTHONORMAL)
    np.testing.assert_allclose(result.q @ result.r / largest, weight / largest, **RECONSTRUCTION)
    assert len(set(result.pivots.tolist())) == k
    np.testing.assert_allclose(np.tril(result.r[:, result.pivots], -1), 0, **EXACT)
    np.testing.assert_allclose(np.diag(result.r[:, result.pivots]), result.diagonal, **EXACT)
    assert (result.diagonal >= 0).all()
    noise = EPS * k * float(result.diagonal[0])
    assert (np.diff(result.diagonal) <= TIE * result.diagonal[:-1] + noise).all()
    check_against_lapack(weight, result)


def check_against_lapack(weight: np.ndarray, result: Factorization) -> None:
    """Same energies; same pivots up to the first tie, which must be one."""
    _, r, pivots = scipy.linalg.qr(weight, mode="economic", pivoting=True)
    np.testing.assert_allclose(shares(result.diagonal), shares(np.diag(r)), **ENERGIES)
    different = np.flatnonzero(pivots[: len(result.pivots)] != result.pivots)
    if len(different):
        step = int(different[0])
        ours, theirs = residual_norms(weight, result.pivots[:step])[[result.pivots[step], pivots[step]]]
        noise = 10 * EPS * len(pivots) * float(result.diagonal[0])
        assert abs(ours - theirs) <= TIE * max(ours, theirs) + noise, f"pivots differ at step {step} without a tie"


def shares(diagonal: np.ndarray) -> np.ndarray:
    """Cumulated energy shares; the scale is taken out first, 1e-38 squared is near the smallest number."""
    energies = np.square(diagonal / (np.abs(diagonal).max() or 1.0))
    return np.cumsum(energies) / (energies.sum() or 1.0)


def residual_norms(weight: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Norms of the columns after projection on the complement of the chosen ones, computed directly."""
    if len(chosen) == 0:
        return np.linalg.norm(weight, axis=0)
    q = np.linalg.qr(weight[:, chosen])[0]
    residual = weight - q @ (q.T @ weight)
    return np.linalg.norm(residual - q @ (q.T @ residual), axis=0)


@algorithms
@pytest.mark.parametrize("name", MATRICES)
def test_keeps_its_promises(algorithm: Algorithm, name: str) -> None:
    weight = MATRICES[name]()
    check(weight, algorithm(weight))


@algorithms
def test_generic_weights_have_the_pivots_of_lapack(algorithm: Algorithm) -> None:
    weight = gaussian(200, 160, 11)
    pivots = scipy.linalg.qr(weight, mode="r", pivoting=True)[1]
    np.testing.assert_array_equal(algorithm(weight).pivots, pivots)


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 40),
    width=st.integers(1, 40),
    rank=st.integers(1, 40),
    decades=st.floats(0, 12),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_rank_and_grading(out: int, width: int, rank: int, decades: float, seed: int) -> None:
    rank = min(rank, out, width)
    weight = gaussian(out, rank, seed) * np.logspace(0, -decades, rank) @ gaussian(rank, width, seed + 1)
    for algorithm in (by_lapack, by_cholesky):
        check(weight, algorithm(weight))


def test_a_batch_gives_what_each_weight_gives_alone() -> None:
    batch = np.stack([gaussian(50, 70), low_rank(50, 70, 4), np.zeros((50, 70)), graded(50, 70, 13)])
    together = each(torch.from_numpy(batch))
    for weight, result in zip(batch, together, strict=True):
        check(weight, result)
        np.testing.assert_array_equal(result.pivots, by_cholesky(weight).pivots)


def test_an_early_stop_gives_the_beginning_of_the_whole() -> None:
    batch = torch.from_numpy(np.stack([gaussian(90, 80, seed) for seed in (1, 2)]))
    whole, early = pivoted_qr(batch), pivoted_qr(batch, steps=30)
    assert early.q.shape == (2, 90, 30) and early.r.shape == (2, 30, 80) and early.diagonal.shape == (2, 30)
    np.testing.assert_array_equal(early.pivots, whole.pivots[:, :30])
    np.testing.assert_allclose(early.q, whole.q[:, :, :30], **ORTHONORMAL)
    np.testing.assert_allclose(early.r, whole.r[:, :30], **RECONSTRUCTION)
    assert pivoted_qr(batch, steps=1000).q.shape == (2, 90, 80)
    with pytest.raises(InputError, match="at least one step, not 0"):
        pivoted_qr(batch, steps=0)


def test_only_what_is_kept_is_formed_and_the_diagonal_is_whole() -> None:
    weights = [gaussian(90, 80, 1), graded(90, 80, 6)]
    rule = EnergyShare(0.5)
    kept = pivoted_qr(torch.from_numpy(np.stack(weights)), keep=lambda each: max(map(partial(rank_of, rule), each)))
    ranks = [rank_of(rule, factorize_weight(weight).diagonal) for weight in weights]
    assert kept.q.shape[2] == kept.r.shape[1] == max(ranks) and ranks[0] != ranks[1]
    for row, weight in enumerate(weights):
        expected = factorize_weight(weight)
        assert rank_of(rule, kept.diagonal[row].numpy()) == ranks[row]
        np.testing.assert_allclose(shares(kept.diagonal[row].numpy()), shares(expected.diagonal), **ENERGIES)
        np.testing.assert_allclose(kept.diagonal[row], expected.diagonal, rtol=TIE, atol=0)
        np.testing.assert_array_equal(kept.pivots[row, : ranks[row]], expected.pivots[: ranks[row]])


@pytest.mark.parametrize("name", MATRICES)
def test_the_diagonal_alone_is_that_of_the_factorization(name: str) -> None:
    weight = MATRICES[name]()
    np.testing.assert_array_equal(diagonal_of(weight), factorize_weight(weight).diagonal)
    by_stage = diagonals_of(torch.from_numpy(np.stack([weight, weight])))
    assert by_stage.shape == (2, min(weight.shape))
    # Kahan's matrix has the worst growth of errors that a pivoted Cholesky may have (Higham, 10.3): its small
    # residuals, a thousandth of the energy, lose their digits. R's own diagonal does not come from there.
    tolerance = {"rtol": 0.0, "atol": 1e-3} if name == "Kahan" else ENERGIES
    np.testing.assert_allclose(shares(by_stage[1]), shares(factorize_weight(weight).diagonal), **tolerance)


def test_fp32_and_bf16_weights_are_factorized_in_fp64() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.from_numpy(gaussian(40, 30)).to(dtype)
        check(weight.double().numpy(), each(weight[None])[0])


def test_the_weights_are_left_as_they_were() -> None:
    weight = gaussian(20, 30)
    before = weight.copy()
    by_lapack(weight)
    by_cholesky(weight)
    np.testing.assert_array_equal(weight, before)


@algorithms
def test_numerical_rank_is_found(algorithm: Algorithm) -> None:
    diagonal = algorithm(low_rank(60, 80, 5)).diagonal
    assert rank_of(EnergyShare(1.0), diagonal) == 5
    assert rank_of(FixedRank(30), diagonal) == 5


@algorithms
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_refused(algorithm: Algorithm, value: float) -> None:
    weight = gaussian(4, 5)
    weight[2, 3] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        algorithm(weight)


@algorithms
def test_an_empty_weight_is_refused(algorithm: Algorithm) -> None:
    with pytest.raises(InputError, match="non-empty matrix"):
        algorithm(np.zeros((0, 5)))


def test_a_vector_is_refused() -> None:
    with pytest.raises(InputError, match="non-empty matrix"):
        factorize_weight(np.ones(5))


def test_the_diagonal_of_a_diagonal_weight_is_sorted() -> None:
    np.testing.assert_allclose(factorize_weight(np.diag([3.0, 4.0, 0.0])).diagonal, [4, 3, 0], **EXACT)


def test_update_is_the_same_formula_in_numpy_and_torch() -> None:
    q, c, r = gaussian(6, 3), gaussian(1, 3)[0], gaussian(3, 5)
    expected = q @ np.diag(c) @ r
    np.testing.assert_allclose(update(q, c, r), expected, rtol=1e-14, atol=1e-14)
    from_torch = update(*(torch.from_numpy(part) for part in (q, c, r)))
    np.testing.assert_allclose(from_torch.numpy(), expected, rtol=1e-14, atol=1e-14)
