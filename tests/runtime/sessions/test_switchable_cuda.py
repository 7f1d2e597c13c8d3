"""The switchable session on a GPU: the same answers as on the CPU, from one buffer on the device."""

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.errors import ProviderError
from qrlora_deploy.formats.coefficients import Coefficients
from qrlora_deploy.runtime import Buckets, Predictor, SwitchableSession, open_bundle, open_session, verify
from qrlora_deploy.runtime.prediction.tokenizing import TextEncoder
from qrlora_deploy.runtime.verification.reference import read_reference
from tests.runtime.fire import fire
from tests.tiny import SENTENCES
from tests.tolerances import FP32_ONNX

pytestmark = pytest.mark.gpu


BUCKETS = Buckets((2, 8), (16, 32))


@pytest.fixture(scope="module", params=[None, BUCKETS], ids=["plain", "captured graphs"])
def sessions(switchable: Path, request: pytest.FixtureRequest) -> tuple[SwitchableSession, SwitchableSession]:
    """The CPU's and the GPU's."""
    bundle = open_bundle(switchable)
    try:
        return SwitchableSession(bundle, rows=4), SwitchableSession(bundle, "cuda", rows=4, buckets=request.param)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")


def test_parity_on_cuda(switchable: Path) -> None:
    try:
        report = verify(open_bundle(switchable), "cuda")
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    assert report.passed, report


def test_mixed_rows_growth_and_swaps_equal_the_cpu(
    sessions: tuple[SwitchableSession, SwitchableSession], tiny_customer: Coefficients
) -> None:
    host, device = sessions
    random = np.random.default_rng(5)
    inputs = TextEncoder(host.bundle).encode(SENTENCES)
    names: list[str | None] = [None, *(f"c{index}" for index in range(len(SENTENCES) - 1))]
    answers = []
    for _ in range(3):
        for name in names[1:]:
            values = random.normal(size=tiny_customer.values.shape).astype(np.float32)
            for session in sessions:
                session.load(str(name), replace(tiny_customer, values=values))
        found = device.predict(inputs, names)[0]
        np.testing.assert_allclose(found, host.predict(inputs, names)[0], **FP32_ONNX)
        answers.append(found)
    np.testing.assert_array_equal(answers[0][0], answers[2][0])
    assert (np.abs(answers[0][1:, :4] - answers[2][1:, :4]).max(axis=1) > 1e-3).all()
    assert device.table.memory.rows > 4


def test_back_to_the_first_version_is_exact_on_cuda(
    sessions: tuple[SwitchableSession, SwitchableSession], tiny_customer: Coefficients
) -> None:
    device = sessions[1]
    inputs = TextEncoder(device.bundle).encode(SENTENCES[:2])
    other = replace(tiny_customer, values=-tiny_customer.values)
    answers = []
    for version in (tiny_customer, other, tiny_customer):
        device.load("acme", version)
        answers.append(device.predict(inputs, ["acme", None])[0])
    np.testing.assert_array_equal(answers[0], answers[2])
    assert np.abs(answers[0][0, :4] - answers[1][0, :4]).max() > 1e-3


def test_a_batch_that_fits_no_bucket_runs_as_it_is(
    sessions: tuple[SwitchableSession, SwitchableSession], tiny_customer: Coefficients
) -> None:
    host, device = sessions
    for session in sessions:
        session.load("acme", tiny_customer)
    inputs = TextEncoder(host.bundle).encode(SENTENCES * 2)
    for count in (1, 12, 2, 12):
        some = {name: values[:count] for name, values in inputs.items()}
        names = (["acme", None] * 6)[:count]
        np.testing.assert_allclose(device.predict(some, names)[0], host.predict(some, names)[0], **FP32_ONNX)


def test_a_merged_bundle_runs_as_captured_graphs(exported: Path) -> None:
    bundle = open_bundle(exported)
    try:
        device = Predictor(bundle, "cuda", buckets=BUCKETS)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    expected = Predictor(bundle).predict(SENTENCES)
    for _ in range(3):
        found = device.predict(SENTENCES)
        np.testing.assert_allclose([a.logits for a in found], [a.logits for a in expected], **FP32_ONNX)


def test_models_in_one_process_are_captured_beside_each_others_runs(switchable: Path, exported: Path) -> None:
    """A thread each: two models whose buckets are captured again and again, and two that run as batches come."""
    bundles = [open_bundle(switchable), open_bundle(exported)]
    try:
        plain = [Predictor(bundle, "cuda") for bundle in bundles]
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    expected = [[it.logits for it in Predictor(bundle).predict(SENTENCES)] for bundle in bundles]
    wrong: list[str] = []
    counts, stop = [0] * 4, threading.Event()

    def answer(number: int, make: Callable[[], Predictor]) -> None:
        try:
            while not stop.is_set():
                found = [it.logits for it in make().predict(SENTENCES[: 1 + counts[number] % len(SENTENCES)])]
                np.testing.assert_allclose(found, expected[number % 2][: len(found)], **FP32_ONNX)
                counts[number] += 1
        except BaseException as error:
            wrong.append(f"{number}: {error}")
            stop.set()

    def captured(number: int) -> Predictor:
        return Predictor(bundles[number], "cuda", buckets=BUCKETS)

    jobs = [partial(answer, number, partial(captured, number)) for number in range(2)]
    jobs += [partial(answer, 2 + number, partial(plain.__getitem__, number)) for number in range(2)]
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    stop.wait(8)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert not wrong and min(counts) >= 2, (counts, wrong)


@pytest.mark.slow
@pytest.mark.parametrize("buckets", [None, Buckets((1, 4, 16), (12,))], ids=["plain", "captured graphs"])
def test_swaps_under_fire_give_no_mixture(switchable: Path, buckets: Buckets | None) -> None:
    report = fire(switchable, seconds=15, provider="cuda", buckets=buckets)
    print(report)
    assert report.wrong_count == 0 and report.errors == [], report
    assert report.rows > 1000 and report.swaps > 1000, report


@pytest.mark.parametrize("slot", [-1, -3, -(2**31), 3, 2**31 - 1, 2**62])
def test_a_slot_without_a_row_is_never_another_customer_in_the_bare_graph(switchable: Path, slot: int) -> None:
    """CUDA's Gather does not raise: what it answers there must be nobody's, or the base's."""
    try:
        session = open_session(switchable / "model.onnx", "cuda")
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    case = read_reference(switchable / "reference.safetensors")[1]
    tables = {name: array[1:4] for name, array in case.inputs.items() if name.endswith("_table")}
    text = {name: array for name, array in case.inputs.items() if array.ndim == 2 and name not in tables}
    rows = len(case.logits)
    answers = [session.run(None, text | tables | {"slot": np.full(rows, row, dtype=np.int64)})[0] for row in range(3)]
    try:
        found = session.run(None, text | tables | {"slot": np.full(rows, slot, dtype=np.int64)})[0]
    except Exception as error:
        assert "bounds" in str(error) or "indices" in str(error)
        return
    for theirs in answers:
        assert (np.abs(found - theirs)[np.isfinite(theirs)].max() > 1e-3).all()
