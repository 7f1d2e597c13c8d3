"""Buckets: the same answers as without them, whatever the shape, also while the table grows."""

import gc
import threading
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qrlora_deploy.errors import InputError
from qrlora_deploy.runtime import Buckets, Predictor, SwitchableSession, open_bundle
from qrlora_deploy.runtime.sessions.buckets import pad_into
from qrlora_deploy.runtime.sessions.worker import Worker
from tests.runtime.fire import made_up_customer, made_up_inputs
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

BUCKETS = Buckets((4, 1, 8), (12, 24))
SIZES = st.integers(1, 40)


@given(batches=st.sets(SIZES, min_size=1), lengths=st.sets(SIZES, min_size=1), batch=SIZES, length=SIZES)
def test_the_smallest_bucket_that_fits(batches: set[int], lengths: set[int], batch: int, length: int) -> None:
    found = Buckets(tuple(batches), tuple(lengths)).fit(batch, length)
    fitting = [(b, n) for b in batches for n in lengths if b >= batch and n >= length]
    assert found == (min(fitting) if fitting else None)


@pytest.mark.parametrize(("batches", "lengths"), [((), (8,)), ((8,), ()), ((0, 1), (8,)), ((1,), (-1,))])
def test_buckets_that_make_no_sense_are_refused(batches: tuple[int, ...], lengths: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="buckets need"):
        Buckets(batches, lengths)


def test_every_place_around_the_batch_is_filled() -> None:
    target = np.full((3, 4), 99)
    pad_into(target, np.array([[1, 2], [3, 4]]), fill=7, first=5)
    assert target.tolist() == [[1, 2, 7, 7], [3, 4, 7, 7], [5, 7, 7, 7]]


@pytest.fixture(scope="module")
def sessions(switchable: Path) -> tuple[SwitchableSession, SwitchableSession]:
    """Without and with buckets, with the same customers."""
    bundle = open_bundle(switchable)
    both = SwitchableSession(bundle, threads=1), SwitchableSession(bundle, rows=4, threads=1, buckets=BUCKETS)
    for session in both:
        for number in range(9):
            session.load(f"c{number}", made_up_customer(bundle.manifest, number, (None, 2, 6)[number % 3]))
    return both


@pytest.mark.parametrize("batch", [1, 2, 4, 7, 8, 9])
@pytest.mark.parametrize("length", [3, 12, 13, 24, 25])
def test_a_bucket_changes_no_answer(
    sessions: tuple[SwitchableSession, SwitchableSession], batch: int, length: int
) -> None:
    plain, bucketed = sessions
    names: list[str | None] = [None, *plain.customers()]
    # A larger batch first: what it left behind must not show.
    bucketed.predict(made_up_inputs(plain.manifest, 8, 24, seed=9), (names * 2)[1:9])
    inputs = made_up_inputs(plain.manifest, batch, length, seed=batch)
    inputs["attention_mask"][batch // 2, length // 2 :] = 0
    expected, labels = plain.predict(inputs, names[:batch])
    found, found_labels = bucketed.predict(inputs, names[:batch])
    np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
    np.testing.assert_allclose(found, expected, **FP32_ONNX)
    assert found_labels == labels and found.shape == expected.shape


def test_answers_are_the_callers_own(sessions: tuple[SwitchableSession, SwitchableSession]) -> None:
    session = sessions[1]
    first, _ = session.predict(made_up_inputs(session.manifest, 1, 12, seed=1), ["c0"])
    kept = first.copy()
    session.predict(made_up_inputs(session.manifest, 1, 12, seed=2), ["c1"])
    np.testing.assert_array_equal(first, kept)


def test_growth_under_threads_gives_no_wrong_answer(switchable: Path) -> None:
    bundle = open_bundle(switchable)
    made = {f"c{number}": made_up_customer(bundle.manifest, number) for number in range(70)}
    inputs = made_up_inputs(bundle.manifest, 3, 10)
    alone = SwitchableSession(bundle, rows=128, threads=1)
    for name, coefficients in made.items():
        alone.load(name, coefficients)
    expected = {name: alone.predict(inputs, [name] * 3)[0] for name in made}
    session = SwitchableSession(bundle, rows=2, threads=1, buckets=BUCKETS)
    loaded: list[str] = []
    wrong: list[object] = []
    checked: list[int] = []
    done = threading.Event()

    def ask(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            while not done.is_set():
                if not loaded:
                    continue
                names = [loaded[index] for index in random.integers(len(loaded), size=3)]
                found, _ = session.predict(inputs, names)
                for row, name in enumerate(names):
                    if not np.allclose(found[row], expected[name][row], **FP32_ONNX):
                        wrong.append((name, found[row]))
                checked.append(3)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for name, coefficients in made.items():
        session.load(name, coefficients)
        loaded.append(name)
        before = len(checked)
        while len(checked) < before + 2 and not wrong:
            done.wait(0.0005)
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == [] and session.table.memory.rows == 128


def test_a_table_that_grew_is_not_kept_by_its_buckets(switchable: Path) -> None:
    bundle = open_bundle(switchable)
    session = SwitchableSession(bundle, rows=2, threads=1, buckets=BUCKETS)
    old = weakref.ref(session.table.memory)
    for number in range(4):
        session.load(f"c{number}", made_up_customer(bundle.manifest, number))
    session.predict(made_up_inputs(bundle.manifest, 1, 5), ["c3"])
    gc.collect()
    assert old() is None


def test_merged_bundles_have_buckets_too(exported: Path) -> None:
    bundle = open_bundle(exported)
    plain = Predictor(bundle, threads=1).predict(SENTENCES)
    found = Predictor(bundle, threads=1, buckets=Buckets((4,), (32,))).predict(SENTENCES)
    np.testing.assert_allclose([a.logits for a in found], [a.logits for a in plain], **FP32_ONNX)
    assert [a.label for a in found] == [a.label for a in plain]


def test_a_bucket_longer_than_the_model_is_refused(switchable: Path) -> None:
    with pytest.raises(InputError, match="a bucket of 65 tokens is longer than the model's 64"):
        SwitchableSession(open_bundle(switchable), buckets=Buckets((1,), (8, 65)))


def test_an_error_reaches_the_one_who_asked() -> None:
    worker = Worker()
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0)
    assert worker.call(lambda: 2) == 2
    assert worker.call(threading.current_thread) is not threading.current_thread()


def test_the_thread_ends_with_its_session(switchable: Path) -> None:
    before = {thread for thread in threading.enumerate() if thread.name == "bucket-runner"}
    session = SwitchableSession(open_bundle(switchable), threads=1, buckets=Buckets((1,), (8,)))
    (thread,) = {thread for thread in threading.enumerate() if thread.name == "bucket-runner"} - before
    del session
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
