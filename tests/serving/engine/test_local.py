"""What an engine promises to each request: its own answers, once, whatever becomes of the others."""

import asyncio
import gc
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import InputError, MalformedInputError, QrloraError, UnknownCustomerError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime import Buckets, Bundle, Predictor, SwitchableSession, open_bundle
from qrlora_deploy.serving.engine.admission import Held
from qrlora_deploy.serving.engine.limits import Limits
from qrlora_deploy.serving.engine.local import LocalEngine
from qrlora_deploy.serving.engine.models import MergedModel
from qrlora_deploy.serving.engine.promise import Promise
from qrlora_deploy.serving.engine.requests import Request, WaitingRow
from qrlora_deploy.serving.engine.rows import Load, Row
from qrlora_deploy.serving.refusals import DeadlineError, DrainingError, OverloadedError, TooLargeError
from tests.runtime.fire import made_up_customer
from tests.serving.engine.place import WatchedSession, a_row, alone, ask
from tests.tolerances import EXACT, FP32_ONNX

POISON = 33


def test_answers_are_those_of_the_session(
    engine: LocalEngine, session: WatchedSession, crowd: dict[str, Coefficients]
) -> None:
    names = [None, *crowd]
    rows = [a_row(3 + number % 9, names[number % len(names)], number) for number in range(64)]
    answers = ask(engine, rows).result(30)
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer.logits, alone(session, row), **FP32_ONNX)
        customer = crowd.get(row.customer or "")
        assert answer.digest == (customer.digest if customer else "")
        assert answer.labels == (customer.labels if customer else session.manifest.labels)
    spread = {answer.logits.tobytes() for answer in answers}
    assert len(spread) == len(rows), "no two of these rows have one answer"


def test_the_same_padded_shape_gives_the_same_bits(session: WatchedSession) -> None:
    with LocalEngine(session, Limits(max_padding_tokens=10**6)) as engine:
        rows = [a_row(3 + number, f"c{number}", number) for number in range(8)]
        answers = ask(engine, rows).result(30)
    (inputs, customers), logits = session.asked[0], None
    assert len(session.asked) == 1 and inputs["input_ids"].shape == (8, 10)
    logits, labels = session.predict(inputs, customers)
    order = [customers.index(row.customer) for row in rows]
    for row, answer in zip(order, answers, strict=True):
        np.testing.assert_allclose(answer.logits, logits[row, : len(labels[row])], **EXACT)


def test_requests_meet_in_one_batch(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    first = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    later = [ask(engine, [a_row(6, f"c{number}", number)]) for number in range(10)]
    session.gate.set()
    wait([first, *later], 30)
    assert [len(customers) for _, customers in session.asked] == [1, 10]
    assert engine.stats().rows == 11 and engine.stats().batches == 2


def test_a_request_leaves_nothing_for_the_collector(engine: LocalEngine) -> None:
    def alive() -> int:
        return sum(type(it) in (Request, Promise, WaitingRow) for it in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        for number in range(20):
            assert len(ask(engine, [a_row(5), a_row(6, f"c{number % 4}", number)]).result(30)) == 2
        with pytest.raises(UnknownCustomerError):
            ask(engine, [a_row(6, "nobody")]).result(30)
        # Not the 80 that there were; the engine's two threads and the error hold the last ones.
        assert alive() - before <= 4 * 4
    finally:
        gc.enable()


def test_an_unknown_customer_fails_its_own_request_alone(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    busy = ask(engine, [a_row(5)])
    good = ask(engine, [a_row(6, "c1")])
    bad = ask(engine, [a_row(6, "c1"), a_row(6, "nobody")])
    with pytest.raises(UnknownCustomerError, match="nobody"):
        bad.result(30)
    session.gate.set()
    assert len(good.result(30)) == len(busy.result(30)) == 1
    assert all("nobody" not in customers for _, customers in session.asked)


def test_a_customer_who_leaves_while_its_row_waits(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    busy = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    leaving, staying = ask(engine, [a_row(6, "c3")]), ask(engine, [a_row(6, "c1")])
    session.unload("c3")
    session.gate.set()
    with pytest.raises(UnknownCustomerError, match="c3"):
        leaving.result(30)
    assert len(staying.result(30)) == len(busy.result(30)) == 1


def test_customers_are_fetched_beside_the_runs(
    engine: LocalEngine, session: WatchedSession, crowd: dict[str, Coefficients]
) -> None:
    fetching, go_on = threading.Event(), threading.Event()

    def fetch(customer: str) -> Coefficients:
        fetching.set()
        assert go_on.wait(30)
        return crowd["c5"]

    session.fetch = fetch
    slow = ask(engine, [a_row(6, "late", 1)])
    assert fetching.wait(30)
    assert len(ask(engine, [a_row(6, "c1")]).result(30)) == 1 and not slow.done()
    go_on.set()
    assert slow.result(30)[0].digest == crowd["c5"].digest


def test_a_table_that_is_too_small_for_a_batch(bundle: Bundle, crowd: dict[str, Coefficients]) -> None:
    session = WatchedSession(bundle, rows=4, max_rows=4)
    session.fetch = crowd.__getitem__
    with LocalEngine(session) as engine:
        answers = ask(engine, [a_row(6, name) for name in crowd]).result(30)
    assert [answer.digest for answer in answers] == [customer.digest for customer in crowd.values()]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (QrloraError("no such token"), "no such token"),
        (RuntimeError("a mistake"), "the engine failed: a mistake"),
        (MemoryError(), "the engine failed: MemoryError"),
    ],
)
def test_a_row_that_fails_fails_alone(
    engine: LocalEngine, session: WatchedSession, error: Exception, message: str
) -> None:
    session.poison, session.failing = {POISON}, error  # type: ignore[assignment]
    session.gate.clear()
    busy = ask(engine, [a_row(5, second=40)])
    _until(lambda: engine.stats().queued_rows == 0)
    requests = [ask(engine, [a_row(6, f"c{number}", second=POISON if number == 4 else 41)]) for number in range(9)]
    session.gate.set()
    wait([busy, *requests], 30)
    assert [request.exception() is not None for request in requests] == [number == 4 for number in range(9)]
    failed = requests[4].exception()
    assert isinstance(failed, QrloraError) and str(failed) == message
    assert len(ask(engine, [a_row(5, second=40)]).result(30)) == 1


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": np.array([10**6])}, "row 1 must hold numbers of 0 to"),
        ({"input_ids": np.array([-1])}, "row 1 must hold numbers of 0 to"),
        ({"attention_mask": np.array([2])}, "must hold numbers of 0 to 1"),
        ({"input_ids": np.array([1, 2])}, "must have one length"),
        ({"input_ids": np.array([1], np.int32)}, "must be an int64 array"),
        ({"input_ids": np.array([[1]])}, "must be an int64 array"),
        ({name: np.array([], np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}, "has 0 tokens"),
        ({name: np.ones(65, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}, "has 65 tokens"),
        ({"input_ids": None}, "must be an int64 array"),
    ],
)
def test_rows_that_no_model_takes(
    engine: LocalEngine, session: WatchedSession, inputs: dict[str, np.ndarray], message: str
) -> None:
    one = {name: np.ones(1, np.int64) for name in ("input_ids", "attention_mask", "token_type_ids")}
    request = engine.submit(engine.admit(Load(2, 10, 10), [None, None]), [a_row(4), Row({**one, **inputs}, None)])
    with pytest.raises(MalformedInputError, match=message):
        request.result(30)
    assert not session.asked and _nothing_is_held(engine)


def test_rows_without_inputs_or_with_others_first(engine: LocalEngine) -> None:
    for inputs in ({}, {"another": np.ones(3, np.int64), **a_row(4).inputs}):
        request = engine.submit(engine.admit(Load(1, 10, 10), [None]), [Row(inputs, None)])
        with pytest.raises(MalformedInputError, match="of row 0 must"):
            request.result(30)
    assert _nothing_is_held(engine)


def test_rows_of_another_customer_than_admitted(engine: LocalEngine) -> None:
    request = engine.submit(engine.admit(Load(1, 10, 10), ["c1"]), [a_row(4, "c2")])
    with pytest.raises(MalformedInputError, match="not of the customers"):
        request.result(30)


def test_a_deadline_that_passed_is_never_run(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    busy = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    late = ask(engine, [a_row(6, "c1")], time.monotonic() + 0.02)
    in_time = ask(engine, [a_row(6, "c2")], time.monotonic() + 60)
    time.sleep(0.03)
    session.gate.set()
    with pytest.raises(DeadlineError):
        late.result(30)
    assert len(in_time.result(30)) == len(busy.result(30)) == 1
    assert [customers for _, customers in session.asked] == [[None], ["c2"]]
    with pytest.raises(DeadlineError):
        engine.admit(Load(1, 1, 1), [None], time.monotonic() - 1)
    assert dict(engine.stats().rejected) == {"deadline": 2}


def test_cancelled_requests_are_not_run(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    running = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    waiting = ask(engine, [a_row(6, "c1"), a_row(7, "c2")])
    assert engine.stats().queued_rows == 2
    assert waiting.cancel() and engine.stats().queued_rows == 0
    assert running.cancel()
    session.gate.set()
    assert len(ask(engine, [a_row(5)]).result(30)) == 1
    assert [customers for _, customers in session.asked] == [[None], [None]]
    with pytest.raises(CancelledError):
        waiting.result(1)
    assert wait([waiting, running], 1).not_done == set()
    assert _nothing_is_held(engine)


def test_a_full_queue_refuses_before_texts_are_tokenised(session: WatchedSession) -> None:
    with LocalEngine(session, Limits(max_queue_rows=4, customer_share=1)) as engine:
        session.gate.clear()
        held = ask(engine, [a_row(5)] * 3)
        with pytest.raises(OverloadedError, match="queue is full") as refused:
            engine.admit(Load(2, 10, 10), [None, None])
        assert 0 < (refused.value.retry_after_s or 0) <= 60
        with pytest.raises(TooLargeError, match="5 rows, more than the 4"):
            engine.admit(Load(5, 10, 10), [None] * 5)
        stats = engine.stats()
        assert stats.tokenised_rows == 3 and dict(stats.rejected) == {"overloaded": 1, "too_large": 1}
        session.gate.set()
        held.result(30)
        ticket = engine.admit(Load(4, 10, 10), [None] * 4)
        engine.release(ticket)
        engine.release(ticket)
        with pytest.raises(InputError, match="once"):
            engine.submit(ticket, [a_row(3)] * 4)
        assert _nothing_is_held(engine)


def test_a_drain_answers_what_was_admitted(engine: LocalEngine, session: WatchedSession) -> None:
    session.gate.clear()
    ticket = engine.admit(Load(1, 10, 10), ["c1"])
    requests = [ask(engine, [a_row(4 + number)]) for number in range(8)]
    assert not engine.drain(0.01)
    with pytest.raises(DrainingError):
        ask(engine, [a_row(5)])
    last = engine.submit(ticket, [a_row(6, "c1")])
    session.gate.set()
    assert engine.drain(30)
    assert all(request.done() for request in [*requests, last])
    assert [len(request.result()) for request in [*requests, last]] == [1] * 9
    assert engine.stats().draining and _nothing_is_held(engine)


def test_close_refuses_what_waits_and_answers_what_runs(session: WatchedSession) -> None:
    engine = LocalEngine(session)
    session.gate.clear()
    running = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    waiting = ask(engine, [a_row(6)])
    ticket = engine.admit(Load(1, 10, 10), [None])
    closing = threading.Thread(target=engine.close)
    closing.start()
    session.gate.set()
    closing.join(30)
    assert len(running.result(0)) == 1
    for refused in (waiting, engine.submit(ticket, [a_row(6)])):
        with pytest.raises(DrainingError):
            refused.result(0)
    engine.close()
    assert _nothing_is_held(engine)


def test_an_event_loop_waits_for_answers(engine: LocalEngine) -> None:
    async def both() -> list[int]:
        futures = [asyncio.wrap_future(ask(engine, [a_row(5), a_row(6, "c2")])) for _ in range(2)]
        return [len(answers) for answers in await asyncio.gather(*futures)]

    assert asyncio.run(both()) == [2, 2]


def test_shapes_of_buckets_are_kept(bundle: Bundle, crowd: dict[str, Coefficients]) -> None:
    session = WatchedSession(bundle, buckets=Buckets((1, 4, 8), (8, 16)))
    session.load("c1", crowd["c1"])
    with LocalEngine(session, Limits(max_batch_tokens=64, max_padding_tokens=0)) as engine:
        rows = [a_row(3 + number % 14, "c1", number) for number in range(40)]
        answers = ask(engine, rows).result(30)
    for row, answer in zip(rows, answers, strict=True):
        np.testing.assert_allclose(answer.logits, alone(session, row, 8 if row.length <= 8 else 16), **FP32_ONNX)
    shapes = {(len(customers), 8 if inputs["input_ids"].shape[1] <= 8 else 16) for inputs, customers in session.asked}
    assert shapes <= {(1, 8), (4, 8), (8, 8), (1, 16), (4, 16)}


def test_a_mistake_of_the_engine_costs_what_it_held_and_no_more(
    engine: LocalEngine, session: WatchedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    session.gate.clear()
    busy = ask(engine, [a_row(5)])
    _until(lambda: engine.stats().queued_rows == 0)
    lost = ask(engine, [a_row(6)])

    def mistaken(*arguments: object) -> None:
        monkeypatch.undo()
        raise KeyError("mistake")

    monkeypatch.setattr("qrlora_deploy.serving.engine.waiting_room.cut", mistaken)
    session.gate.set()
    assert len(busy.result(30)) == 1
    with pytest.raises(QrloraError, match="the engine failed: 'mistake'"):
        lost.result(30)
    assert len(ask(engine, [a_row(7)]).result(30)) == 1
    assert _nothing_is_held(engine)


def test_a_batch_that_is_not_full_waits_where_it_may(session: WatchedSession) -> None:
    with LocalEngine(session, Limits(max_wait_s=60, max_batch_tokens=20)) as engine:
        first = ask(engine, [a_row(8, "c1")])
        time.sleep(0.05)
        assert not session.asked
        second = ask(engine, [a_row(12, "c2")])
        assert len(first.result(30)) == len(second.result(30)) == 1
        left = ask(engine, [a_row(8, "c1")])
        # A drain does not wait for more rows.
        assert engine.drain(30) and left.done()


def test_a_merged_bundle_answers_nobodys_rows(exported: Path, tiny_customer: Coefficients) -> None:
    bundle = open_bundle(exported)
    with LocalEngine(MergedModel(bundle)) as engine, pytest.raises(UnknownCustomerError, match="merged bundle"):
        rows = [a_row(5), a_row(9)]
        predictor = Predictor(bundle)
        for row, answer in zip(rows, ask(engine, rows).result(30), strict=True):
            expected = predictor._merged.run({name: values[None] for name, values in row.inputs.items()})[0]
            np.testing.assert_allclose(answer.logits, expected, **FP32_ONNX)
            assert answer.digest == tiny_customer.digest and answer.labels == bundle.manifest.labels
        assert engine.stats().resident == 0
        ask(engine, [a_row(5, "acme")]).result(30)
    with pytest.raises(InputError, match="is a merged bundle"):
        SwitchableSession(bundle)


def test_what_was_padded_is_counted(session: WatchedSession) -> None:
    with LocalEngine(session, Limits(max_padding_tokens=100)) as engine:
        ask(engine, [a_row(5), a_row(9), a_row(10)]).result(30)
        assert (engine.stats().run_tokens, engine.stats().padded_tokens) == (24, 30)
        assert engine.stats().run_s > 0 and engine.stats().queue_s > 0


def test_many_threads_submit_and_cancel(engine: LocalEngine, session: WatchedSession) -> None:
    futures: list[tuple[Row, Future]] = []
    refused = []

    def hammer(seed: int) -> None:
        random = np.random.default_rng(seed)
        for number in range(150):
            row = a_row(int(random.integers(2, 20)), f"c{random.integers(16)}", seed * 150 + number)
            try:
                future = ask(engine, [row])
            except OverloadedError as error:
                refused.append(error)
                continue
            if random.random() < 0.3:
                future.cancel()
            futures.append((row, future))

    threads = [threading.Thread(target=hammer, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert engine.drain(60)
    assert len(futures) + len(refused) == 900
    answered = [(row, future) for row, future in futures if not future.cancelled()]
    for row, future in answered[::7]:
        np.testing.assert_allclose(future.result(0)[0].logits, alone(session, row), **FP32_ONNX)
    assert all(len(future.result(0)) == 1 for _, future in answered) and len(answered) > 300
    assert _nothing_is_held(engine)


def test_the_digest_is_of_the_version_that_answered(
    engine: LocalEngine, session: WatchedSession, bundle: Bundle
) -> None:
    row, versions = a_row(8, "c1"), [made_up_customer(bundle.manifest, 100 + number) for number in range(3)]
    expected = {}
    for version in versions:
        session.load("c1", version)
        expected[version.digest] = alone(session, row)
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            for version in versions:
                session.load("c1", version)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        answers = [ask(engine, [row, a_row(8, "c2"), row]).result(30) for _ in range(150)]
    finally:
        stop.set()
        swapping.join(30)
    seen = set()
    for answer in (answer for request in answers for answer in (request[0], request[2])):
        np.testing.assert_allclose(answer.logits, expected[answer.digest], **FP32_ONNX)
        seen.add(answer.digest)
    first, second = (expected[digest] for digest in list(expected)[:2])
    assert np.abs(first - second).max() > 0.1 and len(seen) > 1


def _nothing_is_held(engine: LocalEngine) -> bool:
    stats, room = engine.stats(), engine._room
    held = (room._gate.admission.held, room._gate.admission.by_customer, room._open, room._queue._waiting)
    return (stats.queued_rows, stats.queued_tokens) == (0, 0) and held == (Held(), {}, set(), {})


def _until(true: Callable[[], bool]) -> None:
    stop = time.monotonic() + 30
    while not true():
        assert time.monotonic() < stop
        time.sleep(0.001)
