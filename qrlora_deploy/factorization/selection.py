"""A basis of some of the directions of another one."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from qrlora_deploy.errors import InputError
from qrlora_deploy.formats.basis import Basis, BasisTarget
from qrlora_deploy.rank_rules.base import RankRule


def keep_directions(basis: Basis, kept: Mapping[str, np.ndarray], rule: RankRule) -> Basis:
    """The basis with some directions of each target; a target that keeps none is left out.

    Args:
        basis: with all directions that there are to choose from.
        kept: by the target's name, increasing indices of directions.
        rule: what chose them.

    Raises:
        InputError: no direction is kept.
    """
    targets = tuple(_of(target, kept[target.name]) for target in basis.targets if len(kept[target.name]))
    if not targets:
        raise InputError("no direction of any target is kept")
    return replace(basis, targets=targets, rule=rule, file=None)


def _of(target: BasisTarget, kept: np.ndarray) -> BasisTarget:
    """Some directions of a target. The diagonal has those that are kept first, as `energy` and `condition` expect."""
    others = np.setdiff1d(np.arange(len(target.diagonal)), kept)
    return replace(
        target,
        q=np.ascontiguousarray(target.q[:, kept]),
        r=np.ascontiguousarray(target.r[kept]),
        diagonal=target.diagonal[np.concatenate([kept, others])],
    )
