"""How many replicas there should be, by the rows that wait in them."""

from collections.abc import Iterable
from dataclasses import dataclass

from qrlora_deploy.errors import InputError, argument

QUEUED_ROWS = "queued_rows"
"""The number that every replica tells."""


@dataclass(frozen=True)
class Scaling:
    """Bounds of the number of replicas, and when it changes.

    Attributes:
        replicas: at least and at most; twice the same: so many.
        queued_rows: that may wait in a replica; with more on average there will be more replicas, with less fewer.
        up_s: that more must wait before there are more.
        down_s: that less must wait before there are fewer.

    Raises:
        InputError: a number is below its bound.
    """

    replicas: tuple[int, int] = (2, 2)
    queued_rows: int = 256
    up_s: float = 10.0
    down_s: float = 300.0

    def __post_init__(self) -> None:
        least, most = self.replicas
        if not 1 <= least <= most:
            raise InputError(
                f"{argument('replicas', f'{least}:{most}')} must be two numbers from 1 up, the lower one first"
            )
        if self.queued_rows < 1:
            raise InputError(f"{argument('queued_rows', self.queued_rows)} must be at least 1")


def wanted(waiting: Iterable[float], replicas: int, rows: int) -> int:
    """Replicas for what waits.

    Args:
        waiting: rows in each replica that has told; one that has not yet counts as the average of the others.
        replicas: that there are.
        rows: that may wait in each.
    """
    told = list(waiting)
    if not told:
        return replicas
    total = sum(told) / len(told) * max(replicas, len(told))
    return int(-(-total // rows))
