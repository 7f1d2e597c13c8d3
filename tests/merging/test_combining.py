"""Customers of one basis add up: to one rounding, in any order, and in what the model then does."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qrlora_deploy.errors import BasisMismatchError, InputError
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.formats.coefficients import Coefficients, read_coefficients, write_coefficients
from qrlora_deploy.merging.checkpoints import merge_model
from qrlora_deploy.merging.combining import combine
from qrlora_deploy.models.adapter import attach, set_coefficients
from qrlora_deploy.models.checkpoint import open_checkpoint
from tests.golden.make import golden_coefficients
from tests.tiny import SENTENCES
from tests.tolerances import EXACT, FP32_SIDE_BRANCH, ONE_ROUNDING

VALUES = st.floats(-(2.0**60), 2.0**60, width=32)
WEIGHTS = st.floats(-(2.0**60), 2.0**60)
SETS = st.integers(1, 5).flatmap(
    lambda size: st.lists(st.tuples(hnp.arrays(np.float32, size, elements=VALUES), WEIGHTS), min_size=1, max_size=4)
)
FRACTION_OF_FP32 = Fraction(1, 2**149)
"""The smallest number of fp32; half of it may be lost where a sum is smaller than fp32 holds."""


def customer(values: np.ndarray) -> Coefficients:
    return replace(golden_coefficients(), values=values, head={}, training={"seed": 1})


@settings(deadline=None)
@given(parts=SETS)
def test_a_sum_is_exact_to_one_rounding(parts: list[tuple[np.ndarray, float]]) -> None:
    found = combine([(customer(values), weight) for values, weight in parts])
    assert found.values.dtype == np.float32
    for place, value in enumerate(found.values):
        exact = sum((Fraction(float(values[place])) * Fraction(weight) for values, weight in parts), Fraction(0))
        # Half a step, and a hair for the step from the exact sum to fp64.
        bound = abs(exact) * Fraction(ONE_ROUNDING["float32"]) * (1 + Fraction(1, 2**28)) + FRACTION_OF_FP32 / 2
        assert abs(Fraction(float(value)) - exact) <= bound


def test_thresholds_of_a_part_are_not_those_of_the_sum() -> None:
    values = np.ones(3, np.float32)
    parts = [replace(customer(values), thresholds=(0.25, 0.75)), customer(values)]
    assert combine([(part, 0.5) for part in parts]).thresholds == ()


@settings(deadline=None)
@given(parts=SETS, data=st.data())
def test_order_does_not_matter(parts: list[tuple[np.ndarray, float]], data: st.DataObject) -> None:
    made = [(customer(values), weight) for values, weight in parts]
    shuffled = data.draw(st.permutations(made))
    np.testing.assert_array_equal(combine(shuffled).values, combine(made).values)


@settings(deadline=None)
@given(
    values=hnp.arrays(np.float32, st.integers(1, 9), elements=st.floats(width=32, allow_nan=False).filter(np.isfinite))
)
def test_weight_one_alone_gives_the_same_bits(values: np.ndarray) -> None:
    assert combine([(customer(values), 1.0)]).values.tobytes() == values.tobytes()


@settings(deadline=None)
@given(parts=SETS, power=st.integers(-20, 3))
def test_linear_in_the_weights(parts: list[tuple[np.ndarray, float]], power: int) -> None:
    """A power of two costs no rounding of its own, so the law holds bit for bit above the smallest numbers."""
    made = [(customer(values), weight) for values, weight in parts]
    scaled = combine([(part, weight * 2.0**power) for part, weight in made]).values
    expected = combine(made).values.astype(np.float64) * 2.0**power
    smallest = float(np.finfo(np.float32).tiny) * 2.0**20
    plain = (np.abs(expected) >= smallest) & (np.abs(expected) < 2.0**127)
    np.testing.assert_allclose(scaled[plain], expected[plain], **EXACT)


def test_what_is_taken_away_again_leaves_nothing() -> None:
    one, other = customer(np.array([1, 2e30, -3e-30], np.float32)), customer(np.array([1e-30, 5, 7], np.float32))
    found = combine([(one, 0.1), (other, 1.0), (one, -0.1)])
    np.testing.assert_array_equal(found.values, other.values)


def test_the_record_says_what_was_combined(tmp_path: Path) -> None:
    one, other = customer(np.ones(3, np.float32)), customer(np.full(3, 2, np.float32))
    found = combine([(one, 0.7), (other, -0.3)])
    made_of = [{"digest": one.digest, "weight": 0.7}, {"digest": other.digest, "weight": -0.3}]
    assert found.training == {"combined": made_of}
    assert (found.basis_digest, found.base_digest, found.labels) == (one.basis_digest, one.base_digest, one.labels)
    write_coefficients(found, tmp_path / "both.safetensors")
    assert read_coefficients(tmp_path / "both.safetensors").training == found.training


REFUSED = {
    "basis": ({"basis_digest": "f" * 64}, BasisMismatchError, "a was trained on basis .*, but b on ffffffffffff"),
    "base": ({"base_digest": "f" * 64}, BasisMismatchError, "a was trained on base 3333.*, but b on ffffffffffff"),
    "task": ({"task": "text-regression"}, InputError, "a is for text-classification, but b for text-regression"),
    "labels": ({"labels": ("yes", "no")}, InputError, "a and b have different labels"),
    "length": ({"values": np.ones(2, np.float32)}, InputError, "a has 3 coefficients, but b has 2"),
    "head": ({"head": {"classifier.bias": np.ones(2, np.float32)}}, InputError, "^b: .*head of their own.* with a;"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_customers_that_do_not_belong_together(case: str) -> None:
    change, error, message = REFUSED[case]
    one = customer(np.ones(3, np.float32))
    with pytest.raises(error, match=message):
        combine([(one, 1.0), (replace(one, **change), 1.0)], ["a", "b"])


@pytest.mark.parametrize("weight", [np.nan, np.inf, -np.inf, 1e39, -1e300])
def test_weights_that_are_no_numbers_of_fp32(weight: float) -> None:
    one = customer(np.zeros(3, np.float32))
    with pytest.raises(InputError, match="part 2: the weight"):
        combine([(one, 1.0), (one, weight)])


def test_a_sum_that_does_not_fit_fp32() -> None:
    one = customer(np.array([1, 3e38, 1], np.float32))
    with pytest.raises(InputError, match=r"a, b does not fit fp32 at 1 of 3 places \(first: 1\)"):
        combine([(one, 1.0), (one, 1.0)], ["a", "b"])
    with pytest.raises(InputError, match="nothing to combine"):
        combine([])


def logits(model: torch.nn.Module, tokenizer) -> np.ndarray:  # type: ignore[no-untyped-def]
    with torch.no_grad():
        return model(**tokenizer(list(SENTENCES), padding=True, return_tensors="pt")).logits.numpy()


def test_the_model_does_what_the_weighted_branches_do(
    tiny_base: Path, tiny_basis: Basis, tiny_customer: Coefficients
) -> None:
    """Two side branches, weighted in fp64 weights of the model, against the combined customer's own branch."""
    checkpoint = open_checkpoint(str(tiny_base))
    random = np.random.default_rng(11)
    other = replace(tiny_customer, values=random.normal(size=tiny_basis.total_rank).astype(np.float32))
    combined = combine([(tiny_customer, 0.7), (other, -0.3)])
    branch = checkpoint.load_model()
    set_coefficients(attach(branch, tiny_basis), tiny_basis, combined.values)
    found = logits(branch, checkpoint.tokenizer())

    by_hand = checkpoint.load_model()
    with torch.no_grad():
        for part, weight in ((tiny_customer, 0.7), (other, -0.3)):
            for target in tiny_basis.targets:
                c = tiny_basis.split(part.values)[target.name].astype(np.float64) * weight
                delta = (target.q.astype(np.float64) * c) @ target.r.astype(np.float64)
                by_hand.get_submodule(target.name).weight += torch.tensor(delta, dtype=torch.float32)
    np.testing.assert_allclose(found, logits(by_hand, checkpoint.tokenizer()), **FP32_SIDE_BRANCH)

    merged = checkpoint.load_model()
    merge_model(merged, checkpoint, tiny_basis, combined)
    np.testing.assert_allclose(found, logits(merged, checkpoint.tokenizer()), **FP32_SIDE_BRANCH)
    assert np.abs(found - logits(checkpoint.load_model(), checkpoint.tokenizer())).max() > 0.01
