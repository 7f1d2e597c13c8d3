"""Rows that join and leave: nobody's tokens are lost or mixed up, memory stays bounded, nobody overtakes."""

import os
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime.generation.budget import Budget, CacheFullError, row_capacities, without_small
from qrlora_deploy.runtime.generation.placement import Placement, batch_buckets
from qrlora_deploy.runtime.generation.scheduler import Scheduler, Seat, in_turn

JOINS = int(os.environ.get("QRLORA_JOINS", "300"))
"""Joins and leaves of the long run."""


class Rows:
    """A cache that holds a list of numbers in each row."""

    def __init__(self, capacity: int) -> None:
        self.capacity, self.held = capacity, dict[int, list[int]]()
        self.rows = 0

    @property
    def row_bytes(self) -> int:
        return self.capacity

    def resize(self, rows: int) -> None:
        self.held = {row: self.held.get(row, []) for row in range(rows)}
        self.rows = rows

    def copy_row(self, source: int, target: int, tokens: int) -> None:
        assert tokens <= self.capacity
        self.held[target] = list(self.held[source][:tokens])


def make(
    most: int, capacities: tuple[int, ...] = (4, 16), buckets: tuple[int, ...] = (1, 2, 4), **more: Any
) -> Scheduler:
    return Scheduler(capacities, buckets, Budget(most), Rows, **more)


def seats(scheduler: Scheduler) -> list[Seat]:
    return [seat for group in scheduler.groups.values() for seat in group.placement.rows.values()]


def append(scheduler: Scheduler, seat: Seat, number: int) -> None:
    """A token more in a seat's row."""
    assert seat.row is not None
    held = scheduler.groups[seat.capacity].cache.held[seat.row]
    del held[seat.past :]  # what an earlier owner left
    held.append(number)
    seat.past += 1


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(16, 100))
def test_rows_keep_their_tokens_whoever_joins_and_leaves(data: st.DataObject, most: int) -> None:
    scheduler, written = make(most), dict[Seat, list[int]]()
    for number in range(data.draw(st.integers(1, 60))):
        action = data.draw(st.sampled_from(["add", "add", "admit", "write", "leave"]))
        living = [*seats(scheduler), *scheduler.waiting]
        if action == "add":
            seat = scheduler.add(number, data.draw(st.integers(1, 16)))
            written[seat] = []
        elif action == "admit":
            queue = list(scheduler.waiting)
            admitted = scheduler.admit()
            # In their order; and the first one is not left waiting for rows that nobody has.
            assert [*admitted, *scheduler.waiting] == queue
            assert seats(scheduler) or not queue
        elif action == "write":
            for seat in seats(scheduler):
                if seat.past < seat.needed:
                    append(scheduler, seat, number)
                    written[seat].append(number)
        elif living:
            scheduler.leave(data.draw(st.sampled_from(living)))
        check(scheduler, written, most)


def check(scheduler: Scheduler, written: dict[Seat, list[int]], most: int) -> None:
    budget, used = scheduler._budget, 0
    for capacity, group in scheduler.groups.items():
        used += group.cache.rows * capacity
        assert group.placement.size <= group.cache.rows
        assert group.placement.size in (0, 1, 2, 4)
        for row, seat in group.placement.rows.items():
            assert seat.row == row < group.placement.size
            assert seat.capacity == capacity >= seat.needed
            assert group.cache.held[row][: seat.past] == written[seat]
    assert used == budget.used <= budget.peak <= most
    assert scheduler.seated <= 4


def test_the_largest_bucket_bounds_all_rows_together() -> None:
    scheduler = make(1000)
    for needed in (3, 10, 3, 10, 3, 10):
        scheduler.add(needed, needed)
    assert [seat.needed for seat in scheduler.admit()] == [3, 10, 3, 10]
    scheduler.leave(seats(scheduler)[0])
    assert [seat.needed for seat in scheduler.admit()] == [3]


def test_who_waits_is_not_overtaken_by_somebody_small() -> None:
    scheduler = make(20)
    large, small = scheduler.add("large", 16), scheduler.add("small", 3)
    other = scheduler.add("other", 16)
    last = scheduler.add("last", 3)
    assert scheduler.admit() == [large, small]
    assert scheduler.admit() == [] and list(scheduler.waiting) == [other, last]
    scheduler.leave(small)
    assert scheduler.admit() == []
    scheduler.leave(large)
    assert scheduler.admit() == [other, last]


def test_memory_that_another_group_does_not_use_is_given_back() -> None:
    scheduler = make(16, capacities=(4, 8))
    four = [scheduler.add(number, 4) for number in range(4)]
    assert scheduler.admit() == four
    for seat in four[1:]:
        scheduler.leave(seat)
    assert scheduler.groups[4].cache.rows == 4
    larger = scheduler.add("larger", 8)
    assert scheduler.admit() == [larger]
    assert scheduler.groups[4].cache.rows == 1


def test_what_can_be_spared_is_asked_for() -> None:
    budget, asked = Budget(16), list[int]()

    def spare(size_bytes: int) -> None:
        asked.append(size_bytes)
        budget.take(-size_bytes)

    scheduler = Scheduler((8,), (1, 2), budget, Rows, spare=spare)
    budget.take(12)
    scheduler.add("one", 8)
    assert len(scheduler.admit()) == 1
    assert asked == [4]


def test_a_request_that_never_fits_is_refused() -> None:
    with pytest.raises(
        CacheFullError, match="^cache full: 10 tokens of prompt and answer take 16 bytes .* all of it has 8"
    ):
        make(8).check(10)


def test_a_long_queue_is_refused() -> None:
    scheduler = make(16, max_waiting=2)
    for _ in range(2):
        scheduler.check(4)
        scheduler.add(0, 4)
    with pytest.raises(CacheFullError, match="^cache full: 2 requests wait"):
        scheduler.check(4)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.booleans(), max_size=50), st.data())
def test_only_rows_above_the_batch_move(joins: list[bool], data: st.DataObject) -> None:
    placement = Placement[int]((1, 2, 4, 8))
    places: dict[int, int] = {}
    for number, join in enumerate(joins):
        if join and placement.size_after_join is not None:
            places[number] = placement.join(number)
        elif places:
            owner = data.draw(st.sampled_from(sorted(places)))
            moves = placement.leave(places.pop(owner))
            moved = dict(moves)
            assert all(source >= placement.size > target for source, target in moves)
            places = {name: moved.get(row, row) for name, row in places.items()}
        assert placement.rows == {row: name for name, row in places.items()}


def test_thousands_join_and_leave_one_row() -> None:
    scheduler, resident = make(64), None
    for number in range(JOINS):
        seat = scheduler.add(number, 4)
        assert scheduler.admit() == [seat]
        append(scheduler, seat, number)
        if resident is None:
            resident = seat
        else:
            scheduler.leave(seat)
        assert scheduler.groups[4].cache.held[resident.row][: resident.past] == [0]


def test_a_step_reads_no_more_of_prompts_than_its_budget() -> None:
    waiting = [Seat(number, size, 16) for number, size in enumerate((6, 3, 3, 1))]
    assert in_turn(waiting, 8, lambda seat: seat.needed) == waiting[:1]
    assert in_turn(waiting, 9, lambda seat: seat.needed) == waiting[:2]
    assert in_turn(waiting, 1, lambda seat: seat.needed) == waiting[:1]
    assert in_turn([], 9, lambda seat: seat.needed) == []


def test_sizes_of_batches_and_rows() -> None:
    assert batch_buckets(1) == (1,)
    assert batch_buckets(8) == (1, 2, 4, 8)
    assert batch_buckets(12) == (1, 2, 4, 8, 12)
    assert batch_buckets(8, [8]) == (8,)
    assert row_capacities(2048) == (256, 1024, 2048)
    assert row_capacities(100) == (100,)
    assert row_capacities(256) == (256,)
    assert row_capacities(100, [50, 20]) == (20, 50)


def test_capacities_that_save_nothing_are_left_out() -> None:
    # Rows take three quarters.
    most = 4 * 2048 * 10 * 4 // 3 + 4
    assert without_small((256, 1024, 2048), rows=4, token_bytes=10, most=most) == (2048,)
    assert without_small((256, 1024, 2048), rows=4, token_bytes=10, most=most - 8) == (1024, 2048)
    assert without_small((256, 1024, 2048), rows=4, token_bytes=10, most=1) == (256, 1024, 2048)


@pytest.mark.parametrize("bad", [[], [0], [3], [4, 9]])
def test_bad_sizes_of_batches_are_refused(bad: list[int]) -> None:
    with pytest.raises(InputError, match="^batches must be"):
        batch_buckets(8, bad)


@pytest.mark.parametrize("bad", [[], [0], [101]])
def test_bad_sizes_of_rows_are_refused(bad: list[int]) -> None:
    with pytest.raises(InputError, match="^capacities must be"):
        row_capacities(100, bad)


@pytest.mark.parametrize("bad", [0, -1, True, 1.5])
def test_bad_bounds_are_refused(bad: Any) -> None:
    with pytest.raises(InputError, match="^max_rows must be"):
        batch_buckets(bad)
    with pytest.raises(InputError, match="^max_cache_bytes must be"):
        Budget(bad)
