"""Many customers that go into a table at once, while it is in use."""

import threading
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TableLayout
from qrlora_deploy.runtime.customers import packed as packed_module
from qrlora_deploy.runtime.table.id_index import IdIndex
from qrlora_deploy.runtime.table.memory import HostMemory, make_memory
from qrlora_deploy.runtime.table.table import CoefficientTable, TableFullError, rows_of
from tests.runtime.bulks import publish_many

WIDTH = 16


def new_table(rows: int = 4, max_rows: int | None = None) -> CoefficientTable:
    return CoefficientTable(lambda count: make_memory({TABLE: WIDTH}, count, "cpu"), rows, max_rows)


def block(*numbers: float) -> dict[str, np.ndarray]:
    return {TABLE: np.repeat(np.array(numbers, np.float32)[:, None], WIDTH, axis=1)}


def test_a_bulk_that_fails_changes_nothing() -> None:
    table = new_table(rows=8)
    publish_many(table, ["a", "b"], [block(1, 2)], note="n")
    free = sorted(table._free)

    def breaks() -> Any:
        yield block(3)
        raise RuntimeError("the disk is gone")

    for names, blocks, error in (
        (["a", "c"], breaks(), RuntimeError),
        (["a", "c"], [block(3)], InputError),
        (["a", "c"], [block(3), block(4, 5)], InputError),
        (["a", "a"], [block(3, 4)], InputError),
        (["a"], [{TABLE: np.zeros((1, WIDTH + 1), np.float32)}], ValueError),
    ):
        with pytest.raises(error):
            publish_many(table, names, blocks)
    assert sorted(table._free) == free and table.customers() == ["a", "b"]
    held, _ = table.hold(["a", "b"])
    part = table.memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    assert part.array[rows_of(["a", "b"], held)][:, 0].tolist() == [1, 2] and table.note_of(held["a"]) == "n"


def test_a_bulk_uses_the_gaps_and_never_pushes_out() -> None:
    table = new_table(rows=8, max_rows=8)
    for name in "abcdefg":
        table.publish(name, {TABLE: np.zeros(WIDTH, np.float32)})
    for name in "bdf":
        table.remove(name)
    with pytest.raises(TableFullError, match="4 customers need as many free rows, .* no more than 8, 4 of them in use"):
        publish_many(table, list("wxyz"), [block(1, 2, 3, 4)])
    publish_many(table, list("xyz"), [block(1), block(), block(2, 3)])
    assert sorted(table.customers()) == list("acegxyz") and list(table._free) == []
    held, _ = table.hold("axyz")
    part = table.memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    assert part.array[rows_of("axyz", held)][:, 0].tolist() == [0, 1, 2, 3]


def test_bulks_grow_once_and_threads_never_see_a_mixture() -> None:
    made: list[int] = []

    def make(count: int) -> Any:
        made.append(count)
        return make_memory({TABLE: WIDTH}, count, "cpu")

    table = CoefficientTable(make, 2)
    names = [f"c{number}" for number in range(300)]
    wrong: list[object] = []
    stop = threading.Event()

    def bulk(version: int) -> None:
        for turn in range(8):
            number = version * 100 + turn
            publish_many(table, names, (block(*[number] * 50) for _ in range(6)), note=number)

    def single() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            table.publish(names[number % 300], {TABLE: np.full(WIDTH, -number, np.float32)}, note=-number)

    def read() -> None:
        while not stop.is_set():
            chosen = names[:40]
            held, missing = table.hold(chosen)
            if not missing:
                part = table.memory.parts[TABLE]
                assert isinstance(part, HostMemory)
                found = part.array[rows_of(chosen, held)]
                notes = np.array([table.note_of(held[name]) for name in chosen], np.float32)
                if (found != notes[:, None]).any():
                    wrong.append(found)
            table.release(held.values())

    others = [threading.Thread(target=target) for target in (single, read, read)]
    bulks = [threading.Thread(target=bulk, args=(version,)) for version in (1, 2)]
    for thread in (*bulks, *others):
        thread.start()
    for thread in bulks:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert wrong == [] and table._use.holders == {} and table._use.retired == set()
    assert len(table._free) == table.memory.rows - 1 - 300
    held, _ = table.hold(names)
    assert len(set(table._free) | set(held.values())) == table.memory.rows - 1


def test_rows_are_spread_like_single_ones() -> None:
    layout = TableLayout([3, 8, 9])
    values = np.random.default_rng(0).normal(size=(5, 20)).astype(np.float32)
    found = np.zeros((5, layout.width), np.float32)
    packed_module._spread(values, found, layout)
    np.testing.assert_array_equal(found, np.stack([layout.row(row) for row in values]))


def test_names_are_listed_while_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of millions takes seconds; the table's lock is free meanwhile, and changes do not reach it."""
    table = new_table(rows=16)
    table.publish("z", {TABLE: np.zeros(WIDTH, np.float32)})
    publish_many(table, ["a", "b", "c"], [block(1, 2, 3)])
    name, listed = IdIndex.name, []

    def looks(index: IdIndex, place: int) -> str:
        assert not table._lock.locked() and not table._writing.locked() and not table._flipping.locked()
        if not listed:
            table.remove("c")
            table.publish("b", {TABLE: np.zeros(WIDTH, np.float32)})
        listed.append(place)
        return name(index, place)

    monkeypatch.setattr(IdIndex, "name", looks)
    assert table.customers() == ["z", "a", "b", "c"]
    assert table.customers() == ["z", "b", "a"]
