"""Customers who are fetched: once for all who wait, those who ask in turn, and nobody waits for one who is slow."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from qrlora_deploy.errors import QrloraError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.serving.access import Access, open_access
from qrlora_deploy.serving.answering import Texts, answer
from qrlora_deploy.serving.engine.admission import Place
from qrlora_deploy.serving.engine.loading import Loading
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.requests import Request
from qrlora_deploy.serving.engine.rows import Load
from qrlora_deploy.serving.engine.running import MOST_LOADERS
from qrlora_deploy.serving.refusals import DrainingError
from qrlora_deploy.serving.served import ServedModel
from qrlora_deploy.serving.tokenizing import RowTokenizer
from tests.runtime.place import until
from tests.serving.engine.place import WatchedSession, a_row, alone, ask
from tests.tolerances import FP32_ONNX


class Fetching:
    """Customers that are fetched where `gate` lets them; `fetched` keeps their order."""

    def __init__(self) -> None:
        self.gate, self.fetched = threading.Event(), list[str]()
        self.done: list[tuple[Request, QrloraError | None]] = []

    def fetch(self, customer: str) -> None:
        self.fetched.append(customer)
        assert self.gate.wait(30)
        if customer.startswith("no"):
            raise UnknownCustomerError(customer)

    def tell(self, request: Request, error: QrloraError | None) -> None:
        self.done.append((request, error))


def a_request(asker: str = "") -> Request:
    return Request(Place(Load(1, 1, 1, asker), {"c": 1}), [a_row(3)], 0.0)


@contextmanager
def one_thread() -> Iterator[tuple[Loading, Fetching]]:
    """A thread that has begun to fetch "first" and waits at the gate."""
    fetching = Fetching()
    loading = Loading(fetching.fetch, 1, fetching.tell)
    loading.add(a_request("other"), ["first"])
    until(lambda: fetching.fetched == ["first"])
    yield loading, fetching
    fetching.gate.set()
    loading.close()


def test_those_who_ask_take_turns_and_so_do_their_requests() -> None:
    with one_thread() as (loading, fetching):
        loading.add(a_request("greedy"), [f"no{number}" for number in range(20)])
        loading.add(a_request("greedy"), ["own"])
        loading.add(a_request("modest"), ["late"])
        fetching.gate.set()
        until(lambda: len(fetching.fetched) == 23)
    order = [name for name in fetching.fetched if not name.startswith("no")]
    assert order == ["first", "late", "own"]
    # One of the twenty before each of the others.
    assert fetching.fetched.index("late") == 2 and fetching.fetched.index("own") == 3


def test_a_customer_is_fetched_once_for_all_who_wait() -> None:
    with one_thread() as (loading, fetching):
        requests = [a_request(str(number % 3)) for number in range(9)]
        for request in requests:
            loading.add(request, ["shared"])
        alone_and_more = a_request()
        loading.add(alone_and_more, ["shared", "another"])
        fetching.gate.set()
        until(lambda: len(fetching.done) == 11)
    assert sorted(fetching.fetched) == ["another", "first", "shared"]
    assert [error for _, error in fetching.done] == [None] * 11
    assert {request for request, _ in fetching.done} > {*requests, alone_and_more}
    assert not loading._fetches and not loading._turns


def test_one_who_fails_fails_every_request_that_waits_for_it() -> None:
    with one_thread() as (loading, fetching):
        hit, missed = [a_request(), a_request()], a_request()
        for request in hit:
            loading.add(request, ["nobody", "fine"])
        loading.add(missed, ["fine"])
        fetching.gate.set()
        until(lambda: len(fetching.done) >= 4 and len(fetching.fetched) == 3)
    failed = {request for request, error in fetching.done if isinstance(error, UnknownCustomerError)}
    assert failed == set(hit)
    assert (missed, None) in fetching.done


def test_nobody_is_fetched_for_a_request_that_has_ended() -> None:
    with one_thread() as (loading, fetching):
        gone, stays = a_request(), a_request()
        loading.add(gone, ["unwanted", "wanted"])
        loading.add(stays, ["wanted"])
        gone.ended = True
        fetching.gate.set()
        until(lambda: any(request is stays for request, _ in fetching.done))
    assert fetching.fetched == ["first", "wanted"] and not loading._fetches and not loading._turns


def test_a_closed_one_refuses() -> None:
    with one_thread() as (loading, fetching):
        loading.close()
        with pytest.raises(DrainingError):
            loading.add(a_request(), ["late"])


def test_first_loads_pass_slow_files_and_unknown_names(
    engine: LocalEngine, session: WatchedSession, crowd: dict[str, Coefficients]
) -> None:
    go_on, fetched = threading.Event(), list[str]()

    def fetch(customer: str) -> Coefficients:
        fetched.append(customer)
        if customer.startswith("slow"):
            assert go_on.wait(30)
        if customer.startswith("nobody"):
            raise UnknownCustomerError(customer)
        return crowd["c5"]

    session.fetch = fetch
    slow = [ask(engine, [a_row(6, f"slow{number % (MOST_LOADERS - 1)}", number)]) for number in range(60)]
    unknown = [ask(engine, [a_row(6, f"nobody{number}")]) for number in range(300)]
    row = a_row(6, "late", 1)
    answer = ask(engine, [row]).result(30)[0]
    assert answer.digest == crowd["c5"].digest and not any(request.done() for request in slow)
    np.testing.assert_allclose(answer.logits, alone(session, row), **FP32_ONNX)
    for request in unknown:
        with pytest.raises(UnknownCustomerError):
            request.result(30)
    go_on.set()
    assert all(request.result(30)[0].digest == crowd["c5"].digest for request in slow)
    assert sum(name.startswith("slow") for name in fetched) == MOST_LOADERS - 1, "each one once"


def test_the_key_of_a_request_is_who_asks(session: WatchedSession, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    with LocalEngine(session) as engine:
        admit = engine.admit

        def noted(load: Load, *arguments: Any) -> Place:
            asked.append(load.asker)
            return admit(load, *arguments)

        monkeypatch.setattr(engine, "admit", noted)
        model = ServedModel("tiny", session.bundle, engine, RowTokenizer(session.bundle))
        for access in (Access("3f9a01c2b7d4"), open_access, None):
            asyncio.run(answer(model, Texts(["where is it"]), ["c1"], access=access))
    assert asked == ["3f9a01c2b7d4", "", ""]
