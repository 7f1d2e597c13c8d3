"""Customers in turn: one that floods the queue does not keep the others waiting."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.serving.engine.admission import Place
from qrlora_deploy.serving.engine.fairness import FairQueue
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.requests import Request, WaitingRow
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.refusals import OverloadedError
from tests.serving.engine.place import WatchedSession, a_row, ask

REQUEST = Request(Place(Load(1, 1, 1), {None: 1}), [], 0.0)
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "c", None]), st.integers(1, 300)), max_size=80)


def waiting(rows: list[tuple[str | None, int]]) -> list[WaitingRow]:
    return [WaitingRow(REQUEST, number, customer, length) for number, (customer, length) in enumerate(rows)]


@given(ROWS, st.integers(1, 500), st.integers(1, 600), st.data())
def test_every_row_comes_out_once_and_each_customers_in_order(
    rows: list[tuple[str | None, int]], quantum: int, tokens: int, data: st.DataObject
) -> None:
    queue, all_rows = FairQueue(quantum), waiting(rows)
    queue.push(all_rows)
    gone = data.draw(st.sets(st.sampled_from(all_rows)) if all_rows else st.just(set()))
    queue.discard(gone)
    queue.discard(gone)
    drawn: list[WaitingRow] = []
    while queue.rows:
        part = queue.draw(tokens)
        assert part and (sum(row.length for row in part) <= tokens or len(part) == 1)
        drawn += part
    assert {id(row) for row in drawn} == {id(row) for row in all_rows} - {id(row) for row in gone}
    assert len(drawn) == len(all_rows) - len(gone)
    for customer in ("a", "b", "c", None):
        numbers = [row.number for row in drawn if row.customer == customer]
        assert numbers == sorted(numbers)
    assert (queue.rows, queue.tokens, queue._waiting, len(queue._turns)) == (0, 0, {}, 0)
    assert queue.draw(tokens) == []


@pytest.mark.parametrize("lengths", [{"a": 10, "b": 10}, {"a": 200, "b": 7}, {"a": 64, "b": 63, "c": 1}])
def test_customers_who_wait_get_as_many_tokens_each(lengths: dict[str, int]) -> None:
    queue = FairQueue(128)
    for customer, length in lengths.items():
        queue.push(waiting([(customer, length)] * (20_000 // length)))
    got: Counter[str | None] = Counter()
    for row in queue.draw(9_000):
        got[row.customer] += row.length
    # A turn more or less, and a row.
    assert max(got.values()) - min(got.values()) <= 2 * (128 + 200)


def test_a_flood_does_not_keep_a_single_row_waiting(session: WatchedSession) -> None:
    limits = Limits(max_batch_tokens=64, max_padding_tokens=64)
    with LocalEngine(session, limits) as engine:
        session.gate.clear()
        flood = [ask(engine, [a_row(8, "c1", number) for number in range(50)]) for number in range(20)]
        # The engine has taken the first batch or so of the flood.
        single = ask(engine, [a_row(8, "c2")])
        session.gate.set()
        single.result(30)
        for request in flood:
            request.result(30)
    place = next(number for number, (_, customers) in enumerate(session.asked) if "c2" in customers)
    assert place <= 5 and len(session.asked) >= 125


def test_a_customers_share_of_the_queue_is_bounded(session: WatchedSession) -> None:
    with LocalEngine(session, Limits(max_queue_rows=11, customer_share=0.5)) as engine:
        session.gate.clear()
        requests = [ask(engine, [a_row(8, "c1")] * 5)]
        with pytest.raises(OverloadedError, match="customer's share"):
            ask(engine, [a_row(8, "c1")])
        requests.append(ask(engine, [a_row(8, "c2")] * 4))
        with pytest.raises(OverloadedError, match="customer's share"):
            ask(engine, [a_row(8, "c2"), a_row(8, "c1")])
        session.gate.set()
        assert [len(request.result(30)) for request in requests] == [5, 4]
        ask(engine, [a_row(8, "c1")] * 5).result(30)
