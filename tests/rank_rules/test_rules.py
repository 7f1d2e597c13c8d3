"""The rank rules against their definitions, and how files keep them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.energy_budget import EnergyBudget
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.even_budget import EvenBudget
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.rank_rules.registry import BY_KIND, check_rule, chosen_ranks, read_rule, rule_of, stored_rule
from qrlora_deploy.rank_rules.unknown import UnknownRule
from tests.rank_rules.ranks import rank_of

diagonals = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=50).map(
    lambda values: np.sort(np.array(values))[::-1]
)


@settings(deadline=None)
@given(diagonals, st.floats(1e-6, 1))
def test_tau_gives_the_smallest_rank_that_holds_the_energy(diagonal: np.ndarray, tau: float) -> None:
    rank = rank_of(EnergyShare(tau), diagonal)
    energies = np.square(diagonal)
    assert 1 <= rank <= len(diagonal)
    slack = 1e-12 * energies.sum()
    assert energies[:rank].sum() >= tau * energies.sum() - slack
    assert rank == 1 or energies[: rank - 1].sum() < tau * energies.sum() + slack


@settings(deadline=None)
@given(diagonals, st.floats(1e-6, 1), st.floats(1e-6, 1))
def test_rank_grows_with_tau(diagonal: np.ndarray, first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert rank_of(EnergyShare(low), diagonal) <= rank_of(EnergyShare(high), diagonal)


@given(st.integers(1, 60), st.integers(1, 50))
def test_a_fixed_rank_is_capped_by_the_size(rank: int, size: int) -> None:
    assert rank_of(FixedRank(rank), np.ones(size)) == min(rank, size)


@given(st.integers(1, 12).map(lambda power: 2**power))
def test_tau_is_reached_exactly_at_a_boundary(size: int) -> None:
    assert rank_of(EnergyShare(0.5), np.ones(size)) == size // 2


def test_a_zero_weight_keeps_one_direction() -> None:
    assert rank_of(EnergyShare(0.5), np.zeros(4)) == 1
    assert rank_of(FixedRank(3), np.zeros(4)) == 1


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=3), diagonals, min_size=1, max_size=4), st.floats(1e-6, 1), st.integers(1, 9))
def test_a_rule_by_target_gives_together_what_it_gives_one_by_one(
    together: dict[str, np.ndarray], tau: float, rank: int
) -> None:
    for rule in (EnergyShare(tau), FixedRank(rank)):
        assert rule.per_target
        assert chosen_ranks(rule, together) == {name: rank_of(rule, diagonal) for name, diagonal in together.items()}


@pytest.mark.parametrize(
    ("tau", "rank", "message"),
    [
        (0.5, 3, "tau and rank exclude each other"),
        (0.0, None, "tau must be in"),
        (1.5, None, "tau must be in"),
        (math.nan, None, "tau must be in"),
        (None, 0, "rank must be a whole number of at least 1"),
        (None, 2**31, "at most 2147483647"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(tau: float | None, rank: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        rule_of(tau, rank)


def test_options_give_rules() -> None:
    assert (rule_of(), rule_of(tau=0.25), rule_of(rank=4)) == (EnergyShare(0.5), EnergyShare(0.25), FixedRank(4))
    assert rule_of(budget=9) == rule_of(budget=9, spread="even") == EvenBudget(9)
    assert rule_of(budget=9, spread="energy") == EnergyBudget(9)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"budget": 9, "rank": 4}, "rank and budget exclude each other"),
        ({"budget": 9, "spread": "odd"}, "spread must be even, energy or, with data, sensitivity, not odd"),
        ({"rank": 9, "spread": "even"}, "spread='even' needs budget"),
        ({"budget": 0}, "budget=0 must be a whole number of at least 1 and at most 2147483647"),
        ({"budget": "9"}, "budget='9' must be a whole number"),
        ({"budget": 9.0}, "budget=9.0 must be a whole number"),
        ({"rank": "9"}, "rank must be a whole number of at least 1"),
        ({"budget": 0, "spread": "energy"}, "budget=0 must be a whole number of at least 1"),
    ],
)
def test_a_budget_that_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        rule_of(**asked)


def test_what_files_keep_of_the_rules_there_are() -> None:
    # Written out: a name that changes would make every file's rule unknown.
    assert stored_rule(EnergyShare(0.25)) == {"kind": "energy-share", "tau": 0.25}
    assert stored_rule(FixedRank(4)) == {"kind": "fixed-rank", "rank": 4}
    assert stored_rule(EvenBudget(4)) == {"kind": "even-budget", "total": 4}
    assert stored_rule(EnergyBudget(4)) == {"kind": "energy-budget", "total": 4}
    assert BY_KIND.keys() == {"energy-share", "fixed-rank", "even-budget", "energy-budget", "sensitivity-budget"}
    assert (str(EnergyShare(0.25)), str(FixedRank(4))) == ("tau 0.25", "rank 4")
    assert (str(EvenBudget(4)), str(EnergyBudget(4))) == ("4 directions, evenly", "4 directions, by energy")


@pytest.mark.parametrize(
    "rule",
    [EnergyShare(1.0), FixedRank(7), EvenBudget(9), EnergyBudget(9), UnknownRule("budget", {"total": 9, "per": ["a"]})],
)
def test_a_stored_rule_is_read_again(rule: RankRule) -> None:
    assert read_rule(stored_rule(rule)) == rule


def test_a_rule_of_another_release_is_shown_and_not_computed() -> None:
    rule = read_rule({"kind": "budget", "total": 900})
    assert str(rule) == 'budget {"total": 900}, unknown to this version'
    assert len(str(UnknownRule("y" * 1000, {"x": "z" * 1000}))) < 200
    with pytest.raises(InputError, match="the rank rule 'budget' is unknown to this version and cannot be computed"):
        rule.choose({"a": np.ones(3)})


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({}, "rule.kind must name a rank rule, such as energy-share, fixed-rank"),
        ({"kind": ""}, "rule.kind must name"),
        ({"kind": 3}, "rule.kind must name"),
        ({"kind": "energy-share", "tau": True}, "the rank rule energy-share: tau: Input should be a valid number"),
        ({"kind": "energy-share", "tau": "0.5"}, "tau: Input should be a valid number"),
        ({"kind": "energy-share", "tau": None}, "tau: Input should be a valid number"),
        ({"kind": "fixed-rank", "rank": 2.0}, "rank: Input should be a valid integer"),
        ({"kind": "fixed-rank"}, "the rank rule fixed-rank has the parameters rank, not none"),
        ({"kind": "energy-share"}, "the rank rule energy-share has the parameters tau, not none"),
        (
            {"kind": "energy-share", "tau": 0.5, "rank": 3},
            "the rank rule energy-share has the parameters tau, not rank, tau",
        ),
    ],
)
def test_a_stored_rule_that_is_none_is_refused(stored: dict[str, Any], message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        read_rule(stored)


def test_a_stored_rule_out_of_range_is_refused() -> None:
    for stored in ({"kind": "energy-share", "tau": 2}, {"kind": "fixed-rank", "rank": 0}):
        with pytest.raises(InputError, match="must be"):
            read_rule(stored)


@dataclass(frozen=True)
class Answering:
    """A rule of somebody else that answers what it was told to."""

    answer: dict[str, Any]

    kind: ClassVar[str] = "answering"
    per_target: ClassVar[bool] = False

    @property
    def parameters(self) -> dict[str, Any]:
        return {"answer": self.answer}

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"a": 1}, "answering must give one rank for each target"),
        ({"a": 1, "b": 1, "c": 1}, "one rank for each target, and no other"),
        ({"a": 1, "b": -1}, "answering gives b rank -1, not a whole number from 0 to 2"),
        ({"a": 0, "b": 0}, "the rank rule answering keeps no direction of any target"),
        ({"a": 2.5, "b": 1}, "answering gives a rank 2.5, not a whole number"),
        ({"a": "2", "b": 1}, "answering gives a rank '2', not a whole number"),
        (None, "must give one rank for each target"),
        ({"a": 4, "b": 1}, "answering gives a rank 4, not a whole number from 0 to 3"),
    ],
)
def test_what_a_rule_answers_is_checked(answer: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        chosen_ranks(Answering(answer), {"a": np.ones(3), "b": np.ones(2)})


def test_ranks_come_in_the_order_of_the_targets() -> None:
    ranks = chosen_ranks(Answering({"b": np.int64(2), "a": 3}), {"a": np.ones(3), "b": np.ones(2)})
    assert list(ranks.items()) == [("a", 3), ("b", 2)] and all(type(rank) is int for rank in ranks.values())


class Foreign:
    """A rule of somebody else's."""

    per_target = False

    def __init__(self, kind: Any, /, **parameters: Any) -> None:
        self.kind, self.parameters = kind, parameters

    def choose(self, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
        return dict.fromkeys(diagonals, 1)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Foreign("budget", total=np.float32(2)), "rule: no file can keep 'budget': Object of type float32"),
        (Foreign("budget", total=math.nan), "rule: no file can keep 'budget': Out of range float"),
        (Foreign("", total=1), "rule: no file can keep '': rule.kind must name a rank rule"),
        (Foreign("budget", kind="other"), "'budget' has a parameter called kind"),
        (Foreign("energy-share", tau=0.5), "the kind 'energy-share' is another rule's"),
        ("tau", "rule must be a rank rule; str has no kind, per_target, parameters, choose"),
    ],
)
def test_a_rule_that_no_file_could_give_back_is_refused(rule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_rule(rule)


def test_a_rule_of_anybody_s_is_taken() -> None:
    for rule in (Foreign("budget", total=3), EnergyShare(0.5), FixedRank(2), UnknownRule("other", {"a": 1})):
        check_rule(rule)
