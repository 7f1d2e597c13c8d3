"""A rule asked about one weight."""

import numpy as np

from qrlora_deploy.rank_rules.base import RankRule


def rank_of(rule: RankRule, diagonal: np.ndarray) -> int:
    """The rank for one `diagonal [k]`."""
    return rule.choose({"": diagonal})[""]
