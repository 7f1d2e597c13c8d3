"""How many replicas there should be."""

import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.serving.ray.scaling import Scaling, wanted


@pytest.mark.parametrize(
    ("waiting", "replicas", "replicas_wanted"),
    [
        ([0, 0, 0], 3, 0),
        ([100, 100], 2, 2),
        ([100, 101], 2, 3),
        ([1000, 0], 2, 10),
        # One of two has told; the other one is taken for as busy.
        ([150], 2, 3),
        # One has ended since it told.
        ([50, 50, 50], 2, 2),
        ([], 4, 4),
        ([1], 1, 1),
    ],
)
def test_replicas_for_what_waits(waiting: list[float], replicas: int, replicas_wanted: int) -> None:
    assert wanted(waiting, replicas, 100) == replicas_wanted


def test_bounds() -> None:
    for bounds in ((0, 1), (3, 2)):
        with pytest.raises(InputError, match=f"replicas='{bounds[0]}:{bounds[1]}' must be two numbers"):
            Scaling(bounds)
    with pytest.raises(InputError, match="queued_rows=0 must be at least 1"):
        Scaling(queued_rows=0)
