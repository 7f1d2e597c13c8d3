"""Python's garbage collector in a server: what was there at its start is not looked at again and again."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

THRESHOLDS = (10_000, 20, 50)
"""Objects that may be made before the youngest are looked at, and how often until the older ones are. A request leaves
no cycles, and a few hundred of them that wait are more objects than Python's own 700."""


@contextmanager
def calm_collector() -> Iterator[None]:
    """Collect once, pass over all that is left from then on, and look at new objects more seldom."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
