"""The coefficient table against a model of it, under threads, and through growth and eviction."""

import threading

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.bundle.row_layout import TABLE, TableLayout
from qrlora_deploy.runtime.table.memory import HostMemory, TableMemory, make_memory
from qrlora_deploy.runtime.table.table import BASE_ROW, CoefficientTable, rows_of
from tests.runtime.bulks import publish_many

WIDTH = 16
NAMES = st.sampled_from(["acme", "bolt", "cargo", "delta", "echo", "fox"])


def new_table(rows: int = 4, max_rows: int | None = None) -> CoefficientTable:
    return CoefficientTable(lambda count: make_memory({TABLE: WIDTH}, count, "cpu"), rows, max_rows)


def version(number: int) -> dict[str, np.ndarray]:
    return {TABLE: np.full(WIDTH, number, dtype=np.float32)}


def array_of(memory: TableMemory) -> np.ndarray:
    part = memory.parts[TABLE]
    assert isinstance(part, HostMemory)
    return part.array


class TableModel(RuleBasedStateMachine):
    """What a table holds, beside dictionaries that say what it should hold."""

    runs = Bundle("runs")

    def __init__(self) -> None:
        super().__init__()
        self.table = new_table()
        self.expected: dict[str, int] = {}
        self.live: dict[int, tuple[TableMemory, dict[str | None, int], dict[str | None, int]]] = {}
        self.count = 0

    @rule(customer=NAMES)
    def publish(self, customer: str) -> None:
        self.count += 1
        self.table.publish(customer, version(self.count), note=self.count)
        self.expected[customer] = self.count

    @rule(customers=st.lists(NAMES, unique=True, min_size=1, max_size=6))
    def publish_many(self, customers: list[str]) -> None:
        self.count += 1
        rows = {TABLE: np.full((len(customers), WIDTH), self.count, dtype=np.float32)}
        publish_many(self.table, customers, [rows], note=self.count)
        self.expected.update(dict.fromkeys(customers, self.count))

    @rule(customer=NAMES)
    def remove(self, customer: str) -> None:
        assert self.table.remove(customer) == (self.expected.pop(customer, None) is not None)

    @rule(target=runs, customers=st.lists(st.one_of(st.none(), NAMES), min_size=1, max_size=5))
    def begin(self, customers: list[str | None]) -> int:
        held, missing = self.table.hold(customers)
        assert set(missing) == {name for name in customers if name is not None and name not in self.expected}
        self.count += 1
        seen = {name: 0 if name is None else self.expected[name] for name in held}
        self.live[self.count] = (self.table.memory, held, seen)
        return self.count

    @rule(run=runs)
    def end(self, run: int) -> None:
        if run in self.live:
            self.table.release(self.live.pop(run)[1].values())

    @invariant()
    def every_run_sees_the_versions_it_began_with(self) -> None:
        for memory, held, seen in self.live.values():
            for name, row in held.items():
                assert (array_of(memory)[row] == seen[name]).all()
                assert (self.table.note_of(row) or 0) == seen[name]

    @invariant()
    def the_base_is_zero_and_no_row_is_lost(self) -> None:
        memory = self.table.memory
        assert not array_of(memory)[BASE_ROW].any()
        used = len(self.table) + len(self.table._use.retired) + len(self.table._free) + 1
        assert used == memory.rows
        assert sorted(self.table.customers()) == sorted(self.expected)
        assert len(set(self.table._free)) == len(self.table._free)
        assert [name in self.table for name in self.expected] == [True] * len(self.expected)


TableModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTableModel = TableModel.TestCase


def test_a_full_table_forgets_what_was_not_used_for_longest() -> None:
    table = new_table(rows=4, max_rows=4)
    for number, name in enumerate("abc", start=1):
        table.publish(name, version(number))
    held, _ = table.hold(["a"])
    table.release(held.values())
    table.publish("d", version(4))
    assert sorted(table.customers()) == ["a", "c", "d"]
    held, missing = table.hold(["a", "b", "c", "d"])
    assert missing == ["b"]
    with pytest.raises(InputError, match="all 4 rows of the table are in use"):
        table.publish("e", version(5))
    table.release(held.values())
    table.publish("e", version(5))
    assert len(table) == 3


def test_of_a_bulk_those_who_were_not_used_give_way_first() -> None:
    table = new_table(rows=5, max_rows=5)
    table.publish("old", version(9))
    publish_many(table, list("abc"), [{TABLE: np.arange(1, 4, dtype=np.float32)[:, None].repeat(WIDTH, axis=1)}])
    assert "a" in table
    held, _ = table.hold(["b"])
    for name, left in (("d", "bcdold"), ("e", "bdeold"), ("f", "bdef"), ("g", "befg")):
        table.publish(name, version(ord(name)))
        assert "".join(sorted(table.customers())) == left
    assert (array_of(table.memory)[held["b"]] == 2).all()
    table.release(held.values())
    assert len(table) == 4 and len(table._free) == 0


def test_a_write_that_fails_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    table = new_table()
    table.publish("a", version(1))
    with pytest.raises(ValueError, match="broadcast"):
        table.publish("a", {TABLE: np.zeros(WIDTH + 1, dtype=np.float32)})
    held, _ = table.hold(["a"])
    assert (array_of(table.memory)[held["a"]] == 1).all()
    free = len(table._free)
    table.release(held.values())
    assert free == 2


def test_threads_never_see_a_mixture() -> None:
    """Readers check whole rows while writers replace them and the table grows."""
    table = new_table(rows=2)
    names = [f"c{number}" for number in range(40)]
    for name in names:
        table.publish(name, version(1))
    stop, wrong = threading.Event(), []

    def write(seed: int) -> None:
        random = np.random.default_rng(seed)
        while not stop.is_set():
            name = names[random.integers(len(names))]
            number = int(random.integers(1, 10**6))
            table.publish(name, version(number), note=number)

    def read(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(1500):
            chosen = [names[index] for index in random.integers(len(names), size=8)]
            held, _ = table.hold(chosen)
            memory = table.memory
            rows = array_of(memory)[rows_of(chosen, held)]
            if (rows != rows[:, :1]).any():
                wrong.append(rows)
            notes = [table.note_of(held[name]) or 1 for name in chosen]
            if (rows[:, 0] != np.array(notes, dtype=np.float32)).any():
                wrong.append(notes)
            table.release(held.values())

    writers = [threading.Thread(target=write, args=(seed,)) for seed in range(2)]
    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(10, 14)]
    for thread in (*writers, *readers):
        thread.start()
    for thread in readers:
        thread.join()
    stop.set()
    for thread in writers:
        thread.join()
    assert wrong == []
    assert table._use.holders == {} and table._use.retired == set()


def test_layout_pads_every_target() -> None:
    layout = TableLayout([3, 8, 9])
    assert layout.padded_ranks == (8, 8, 16) and layout.width == 32 and layout.total_rank == 20
    row = layout.row(np.arange(1, 21, dtype=np.float32))
    assert row[:8].tolist() == [1, 2, 3, 0, 0, 0, 0, 0]
    assert row[8:16].tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    assert row[16:].tolist() == [*range(12, 21), *[0] * 7]
    with pytest.raises(InputError, match="20 coefficients, not 19"):
        layout.row(np.zeros(19, dtype=np.float32))
