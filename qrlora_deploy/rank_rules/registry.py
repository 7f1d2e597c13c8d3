"""The rank rules there are, by kind, and how a file keeps one. A new rule is a module of its own and a line here."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from qrlora_deploy.errors import FileFormatError, InputError, QrloraError, argument
from qrlora_deploy.io.strict import from_json
from qrlora_deploy.rank_rules.base import RankRule
from qrlora_deploy.rank_rules.energy_budget import EnergyBudget
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.even_budget import EvenBudget
from qrlora_deploy.rank_rules.fixed_rank import FixedRank
from qrlora_deploy.rank_rules.sensitivity_budget import SensitivityBudget
from qrlora_deploy.rank_rules.unknown import UnknownRule

BY_KIND: dict[str, type[RankRule]] = {
    rule.kind: rule for rule in (EnergyShare, FixedRank, EvenBudget, EnergyBudget, SensitivityBudget)
}

SPREADS: dict[str, Callable[[int], RankRule]] = {"even": EvenBudget, "energy": EnergyBudget}
"""How a budget may be spread over the weights, by the names that people give."""


def rule_of(
    tau: float | None = None, rank: int | None = None, budget: int | None = None, spread: str | None = None
) -> RankRule:
    """The rule that `tau`, `rank`, or `budget` and `spread` ask for; without any, half of the energy.

    A budget is spread evenly unless `spread` says otherwise.

    Raises:
        InputError: more than one is given, one is out of range, or there is no such spread.
    """
    asked = [name for name, value in (("tau", tau), ("rank", rank), ("budget", budget)) if value is not None]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} exclude each other; give one of them")
    if budget is not None:
        return _budget_rule(budget, "even" if spread is None else spread)
    if spread is not None:
        raise InputError(
            f"{argument('spread', spread)} needs {argument('budget')}, the number of directions it spreads"
        )
    if rank is not None:
        return FixedRank(rank)
    return EnergyShare() if tau is None else EnergyShare(tau)


def _budget_rule(budget: int, spread: str) -> RankRule:
    if spread not in SPREADS:
        raise InputError(f"{argument('spread')} must be {', '.join(SPREADS)} or, with data, sensitivity, not {spread}")
    return SPREADS[spread](budget)


def stored_rule(rule: RankRule) -> dict[str, Any]:
    """What a file keeps of a rule: its kind, and its parameters beside it."""
    return {"kind": rule.kind} | rule.parameters


def read_rule(stored: Mapping[str, Any]) -> RankRule:
    """The rule of a record that `stored_rule` made; one of an unknown kind is an `UnknownRule`.

    Raises:
        FileFormatError: it names no kind, or a known kind with parameters that are not its own.
        InputError: a parameter is out of range.
    """
    kind = stored.get("kind")
    if not isinstance(kind, str) or not kind:
        raise FileFormatError(f"rule.kind must name a rank rule, such as {', '.join(BY_KIND)}")
    parameters = {name: value for name, value in stored.items() if name != "kind"}
    found = BY_KIND.get(kind)
    if found is None:
        return UnknownRule(kind, parameters)
    known = {field.name for field in dataclasses.fields(found)}  # type: ignore[arg-type]  # a rule is a dataclass
    if parameters.keys() != known:
        given = ", ".join(sorted(parameters)) or "none"
        raise FileFormatError(f"the rank rule {kind} has the parameters {', '.join(sorted(known))}, not {given}")
    return from_json(found, json.dumps(parameters), f"the rank rule {kind}")


def check_rule(rule: RankRule) -> None:
    """Make sure, before hours of work, that a rule is one and that a file can keep it and give it back.

    Raises:
        InputError: it has no kind of its own, lacks a part, or has parameters that are no plain JSON values.
    """
    missing = [name for name in ("kind", "per_target", "parameters", "choose") if not hasattr(rule, name)]
    if missing:
        raise InputError(f"rule must be a rank rule; {type(rule).__name__} has no {', '.join(missing)}")
    if type(rule) is not BY_KIND.get(rule.kind, type(rule)):
        raise InputError(f"rule: the kind {rule.kind!r} is another rule's; give this one its own")
    try:
        stored = json.dumps(stored_rule(rule), allow_nan=False)
        kept = read_rule(json.loads(stored)).kind
    except (TypeError, ValueError, QrloraError) as error:
        raise InputError(f"rule: no file can keep {rule.kind!r}: {error}") from error
    if kept != rule.kind:
        raise InputError(f"rule: {rule.kind!r} has a parameter called kind, which is its name in a file")


def chosen_ranks(rule: RankRule, diagonals: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The rule's rank of each target, in the order of `diagonals`, checked: a rule may be anybody's.

    Raises:
        InputError: the rule refuses, or says nothing of a target, or gives a rank that the target cannot have.
    """
    ranks = rule.choose(diagonals)
    if not isinstance(ranks, Mapping) or ranks.keys() != diagonals.keys():
        raise InputError(f"the rank rule {rule.kind} must give one rank for each target, and no other")
    least = 1 if rule.per_target else 0
    for name, diagonal in diagonals.items():
        rank = ranks[name]
        if not isinstance(rank, int | np.integer) or isinstance(rank, bool) or not least <= rank <= len(diagonal):
            raise InputError(
                f"the rank rule {rule.kind} gives {name} rank {rank!r}, not a whole number from {least} to "
                f"{len(diagonal)}"
            )
    if not any(ranks.values()):
        raise InputError(f"the rank rule {rule.kind} keeps no direction of any target")
    return {name: int(ranks[name]) for name in diagonals}
