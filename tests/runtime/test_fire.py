"""Swaps under fire give no mixtures and keep no memory, and the fire notices a table that does."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.runtime import SwitchableSession
from tests.runtime.fire import fire

pytestmark = pytest.mark.slow

MAX_GROWTH_BYTES = 32 * 2**20


def test_a_minute_of_swaps_gives_no_mixture_and_keeps_no_memory(switchable: Path) -> None:
    report = fire(switchable, seconds=60)
    print(report)
    assert report.wrong_count == 0 and report.errors == [], report
    assert report.rows > 10_000 and report.swaps > 10_000 and report.absences > 0, report
    assert report.seen == report.versions, report
    assert report.growth_bytes is None or report.growth_bytes < MAX_GROWTH_BYTES, report


def write_in_place(session: SwitchableSession) -> None:
    """A new version goes over the old one, whoever reads it."""
    table = session.table
    publish = table.publish

    def overwrite(customer: str, values: dict[str, np.ndarray], note: Any = None) -> None:
        held, missing = table.hold([customer])
        table.release(held.values())
        if missing:
            publish(customer, values, note)
        else:
            table.memory.write(held[customer], values)
            table._use._notes[held[customer]] = note

    table.publish = overwrite  # type: ignore[method-assign]


def free_at_once(session: SwitchableSession) -> None:
    """An old row is free for others while runs still read it."""
    table = session.table
    hold, release = table.hold, table.release

    def hold_and_let_go(customers: Iterable[str | None]) -> tuple[dict[str | None, int], list[str]]:
        held, missing = hold(customers)
        release(held.values())
        return held, missing

    table.hold = hold_and_let_go  # type: ignore[method-assign]
    table.release = lambda rows: None  # type: ignore[method-assign]


def nudge_one_number(session: SwitchableSession) -> None:
    """One of a hundred versions is published with its first coefficient ten per cent off."""
    table = session.table
    publish, count = table.publish, iter(range(10**9))

    def blunder(customer: str, values: dict[str, np.ndarray], note: Any = None) -> None:
        if next(count) % 100 == 0:
            values = {name: row.copy() for name, row in values.items()}
            values["coefficient_table"][0] *= 1.1
        publish(customer, values, note)

    table.publish = blunder  # type: ignore[method-assign]


@pytest.mark.parametrize("sabotage", [write_in_place, free_at_once, nudge_one_number])
def test_a_broken_table_is_noticed_within_seconds(
    switchable: Path, sabotage: Callable[[SwitchableSession], None]
) -> None:
    report = fire(switchable, seconds=20, sabotage=sabotage)
    print(report)
    assert report.errors == [], report
    assert report.mixtures > 0, report


def test_growing_memory_is_noticed(switchable: Path) -> None:
    sizes = iter([100 * 2**20, 140 * 2**20])
    report = fire(switchable, seconds=0.5, read_memory=lambda: next(sizes))
    assert report.growth_bytes is not None and report.growth_bytes > MAX_GROWTH_BYTES
