"""Rows a second by customer, by a clock that the test turns."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.serving.engine.admission import Held
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.quotas import SWEEP, Quotas
from qrlora_deploy.serving.refusals import QuotaError, TooLargeError
from tests.serving.engine.place import WatchedSession, a_row, ask


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_bucket_empties_and_fills() -> None:
    clock = Clock()
    quotas = Quotas({"acme": 4.0}, clock=clock)
    quotas.take({"acme": 3})
    with pytest.raises(QuotaError, match="4 rows a second") as refused:
        quotas.take({"acme": 3})
    assert refused.value.retry_after_s == pytest.approx(0.5)
    clock.now += 0.5
    quotas.take({"acme": 3})
    clock.now += 60
    quotas.take({"acme": 4})
    with pytest.raises(QuotaError):
        quotas.take({"acme": 1})
    quotas.take({"other": 10**6, None: 10**6})


def test_all_customers_of_a_request_or_none() -> None:
    quotas = Quotas({"small": 1.0, "large": 10.0}, default=2.0, clock=Clock())
    quotas.take({"small": 1})
    with pytest.raises(QuotaError):
        quotas.take({"large": 10, "small": 1})
    quotas.take({"large": 10, "anyone": 2})
    with pytest.raises(TooLargeError, match="may ask 2 at once"):
        quotas.take({"anyone": 3})


def test_a_customer_may_have_a_burst_of_its_own() -> None:
    clock = Clock()
    quotas = Quotas({"acme": 2.0, "bolt": 2.0}, bursts={"acme": 10.0}, clock=clock)
    quotas.take({"acme": 10, "bolt": 2})
    with pytest.raises(QuotaError) as refused:
        quotas.take({"acme": 10})
    assert refused.value.retry_after_s == pytest.approx(5)
    with pytest.raises(TooLargeError, match="may ask 10 at once"):
        quotas.take({"acme": 11})
    quotas.change({"acme": 2.0})
    with pytest.raises(TooLargeError, match="may ask 2 at once"):
        quotas.take({"acme": 3})


def test_slow_quotas_let_one_row_through_and_others_come_live() -> None:
    clock = Clock()
    quotas = Quotas({"acme": 0.1}, clock=clock)
    quotas.take({"acme": 1})
    with pytest.raises(QuotaError) as refused:
        quotas.take({"acme": 1})
    assert refused.value.retry_after_s == pytest.approx(10)
    quotas.change({"acme": 5.0})
    clock.now += 0.2
    quotas.take({"acme": 1})
    with pytest.raises(InputError, match="'acme' must be positive, not 0"):
        quotas.change({"acme": 0})
    with pytest.raises(InputError, match="burst"):
        Quotas(burst_s=0)


def test_customers_that_went_away_are_forgotten() -> None:
    clock = Clock()
    quotas = Quotas(default=1.0, clock=clock)
    for number in range(3 * SWEEP):
        quotas.take({f"c{number}": 1})
        clock.now += 0.001
    assert len(quotas._buckets) <= SWEEP + 1


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 6)), max_size=60))
def test_nobody_gets_more_than_its_rate_and_one_burst(steps: list[tuple[float, int]]) -> None:
    clock = Clock()
    quotas, got = Quotas({"acme": 3.0}, burst_s=2, clock=clock), 0
    for pause, rows in steps:
        clock.now += pause
        try:
            quotas.take({"acme": rows})
            got += rows
        except QuotaError as error:
            assert rows <= 6 and 0 < (error.retry_after_s or 0) <= 2
    assert got <= 6 + 3 * (clock.now - 100) + 1e-6


def test_an_engine_keeps_quotas(session: WatchedSession) -> None:
    clock = Clock()
    with LocalEngine(session, quotas=Quotas({"c1": 2.0}, clock=clock)) as engine:
        ask(engine, [a_row(5, "c1")] * 2).result(30)
        with pytest.raises(QuotaError):
            ask(engine, [a_row(5, "c1")])
        assert engine._room._gate.admission.held == Held()
        ask(engine, [a_row(5, "c2")] * 9).result(30)
        clock.now += 1
        ask(engine, [a_row(5, "c1")]).result(30)
        assert dict(engine.stats().rejected) == {"quota": 1} and engine.stats().tokenised_rows == 12
