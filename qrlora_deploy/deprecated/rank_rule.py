"""`qrlora_deploy.rank_rule` as it was: one name for the two rules there were."""

from qrlora_deploy.errors import InputError
from qrlora_deploy.rank_rules.base import RankRule as Rule
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.rank_rules.fixed_rank import MAX_RANK, FixedRank

__all__ = ["MAX_RANK", "RankRule"]


def RankRule(tau: float | None = 0.5, rank: int | None = None) -> Rule:
    """The rule for `tau` or a fixed `rank`, exactly one of them.

    Raises:
        InputError: none or both are given, or one is out of range.
    """
    if (tau is None) == (rank is None):
        raise InputError("give either tau or a rank")
    return EnergyShare(tau) if tau is not None else FixedRank(rank or 0)
