"""Batches of one customer by merged weights: the same answers, of the version that is there now, within the bytes."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.onnx import export_per_row, export_switchable
from exporters.onnx.options import OnnxOptions
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import InputError, ProviderError
from qrlora_deploy.exporting.job import ExportJob
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.runtime import Buckets, SwitchableSession, open_bundle, verify
from qrlora_deploy.runtime.sessions import merged_cache
from tests.exporters.test_switchable import save_encoder
from tests.runtime.fire import fire, made_up_customer, made_up_inputs
from tests.tolerances import FP16_DEVICES, FP32_ONNX, FP32_SIDE_BRANCH

BUCKETS = Buckets((1, 4), (12, 24))
PLENTY = 2**24


def export(folder: Path, texts: Examples, **options: Any) -> Path:
    """A switchable bundle of a small RoBERTa with the graphs for one customer."""
    checkpoint = open_checkpoint(str(save_encoder("roberta", folder / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    chosen = OnnxOptions(data=texts, head_labels=6, merged_cache=True, **options)
    export_switchable(ExportJob(checkpoint, basis, folder / "bundle"), chosen)
    return folder / "bundle"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, texts: Examples) -> Path:
    """For the CPU, branches apart."""
    return export(tmp_path_factory.mktemp("merged-cache"), texts)


def open_session(folder: Path, size_bytes: int = PLENTY, **options: Any) -> SwitchableSession:
    """With six customers, some of them with heads."""
    session = SwitchableSession(open_bundle(folder), threads=1, merged_cache_bytes=size_bytes, **options)
    for number in range(6):
        session.load(f"c{number}", made_up_customer(session.manifest, number, (None, 2, 6)[number % 3]))
    return session


def check(session: SwitchableSession, plain: SwitchableSession, tolerance: Any, batch: int = 4) -> None:
    """Every customer by himself and all of them together, again and again."""
    names: list[str | None] = [None, *plain.customers()]
    for turn in range(3):
        for number, name in enumerate(names):
            inputs = made_up_inputs(plain.manifest, batch, 7 + number, seed=turn)
            inputs["attention_mask"][0, 3:] = 0
            for owners in ([name] * batch, [names[(number + row) % len(names)] for row in range(batch)]):
                expected, labels = plain.predict(inputs, owners)
                found, found_labels = session.predict(inputs, owners)
                np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected))
                np.testing.assert_allclose(found, expected, **tolerance)
                assert found_labels == labels


@pytest.mark.parametrize("captured", [False, True])
def test_one_customers_batches_have_the_same_answers(
    folder: Path, captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_cache, "captures", lambda device: captured)
    session = open_session(folder, buckets=BUCKETS if captured else None)
    check(session, open_session(folder, 0), FP32_SIDE_BRANCH)
    assert session.merged is not None and session.merged.merges == 7 and session.merged.hits == 2 * 7


def test_a_merge_never_outlives_its_version(folder: Path) -> None:
    session, plain = open_session(folder), open_session(folder, 0)
    inputs = made_up_inputs(session.manifest, 2, 9)
    for seed in (11, 12, 11):
        for one in (session, plain):
            one.load("c0", made_up_customer(session.manifest, seed, None))
        expected = plain.predict(inputs, ["c0"] * 2)[0]
        for _ in range(3):
            np.testing.assert_allclose(session.predict(inputs, ["c0"] * 2)[0], expected, **FP32_SIDE_BRANCH)
    assert session.merged is not None and session.merged.merges == 3 and len(session.merged._kept) == 1
    session.unload("c0")
    assert not session.merged._kept
    with pytest.raises(InputError, match="no customer is called 'c0'"):
        session.predict(inputs, ["c0"] * 2)


def test_a_customer_who_goes_while_he_is_merged_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, plain = open_session(folder), open_session(folder, 0)
    assert session.merged is not None
    inputs, merged = made_up_inputs(session.manifest, 2, 9), session.merged._merged
    expected = plain.predict(inputs, ["c0"] * 2)[0]

    def gone_meanwhile(row: int) -> Any:
        session.unload("c0")
        return merged(row)

    monkeypatch.setattr(session.merged, "_merged", gone_meanwhile)
    for _ in range(2):
        np.testing.assert_allclose(session.predict(inputs, ["c0"] * 2)[0], expected, **FP32_SIDE_BRANCH)
    assert session.merged.merges == 1 and not session.merged._kept


class _Meeting:
    """A lock before which as many threads meet as a barrier has parties."""

    def __init__(self, barrier: threading.Barrier) -> None:
        self.barrier, self.lock = barrier, threading.Lock()

    def __enter__(self) -> None:
        self.barrier.wait()
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()


def test_threads_that_want_the_same_merge_make_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(folder)
    assert session.merged is not None
    inputs = made_up_inputs(session.manifest, 2, 9)
    monkeypatch.setattr(session.merged, "_counted", lambda customer, digest: True)
    monkeypatch.setattr(session.merged, "_one_merge", _Meeting(threading.Barrier(2, timeout=60)))
    with ThreadPoolExecutor(2) as pool:
        found = [done.result() for done in [pool.submit(session.predict, inputs, ["c0"] * 2) for _ in range(2)]]
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert session.merged.merges == 1


def test_without_room_for_a_merge_the_session_answers(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    session, plain = open_session(folder), open_session(folder, 0)
    assert session.merged is not None
    inputs = made_up_inputs(session.manifest, 2, 9)

    def full() -> Any:
        raise MemoryError("1 byte does not fit GPU 0")

    monkeypatch.setattr(session.merged, "_make", full)
    for _ in range(3):
        expected = plain.predict(inputs, ["c0"] * 2)[0]
        np.testing.assert_array_equal(session.predict(inputs, ["c0"] * 2)[0], expected)
    assert "no room for merged weights: 1 byte does not fit GPU 0" in caplog.text


def test_the_cache_keeps_to_its_bytes(folder: Path) -> None:
    each = open_session(folder).merged
    assert each is not None
    session = open_session(folder, 2 * each._each_bytes)
    check(session, open_session(folder, 0), FP32_SIDE_BRANCH)
    assert session.merged is not None and session.merged.size_bytes == 2 * each._each_bytes
    with pytest.raises(
        InputError, match=rf"bytes of merged weights hold no customer: those of one are {each._each_bytes} bytes"
    ):
        open_session(folder, each._each_bytes - 1)


def test_bytes_that_are_none_are_refused(folder: Path) -> None:
    for size_bytes in (-5, 1e6, float("nan"), "8"):
        with pytest.raises(InputError, match="merged_cache_bytes=.* must be a whole number of at least 0"):
            open_session(folder, size_bytes)  # type: ignore[arg-type]


def test_a_bundle_without_the_graphs_is_refused(switchable: Path) -> None:
    with pytest.raises(InputError, match="has no graphs for one customer; export it with merged_cache"):
        SwitchableSession(open_bundle(switchable), merged_cache_bytes=PLENTY)


def test_exports_that_have_no_use_for_the_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="merged_cache needs precision='fp32' or fp16"):
        OnnxOptions(merged_cache=True, precision="int8")
    checkpoint = open_checkpoint(str(save_encoder("roberta", tmp_path / "base")))
    basis = factorize(checkpoint, choose_targets(checkpoint.skeleton()), EnergyShare(0.5))
    with pytest.raises(InputError, match="merged_cache belongs to a switchable bundle; a per-row one has no table"):
        export_per_row(ExportJob(checkpoint, basis, tmp_path / "rows"), OnnxOptions(merged_cache=True))


def test_swaps_beside_one_customers_batches_give_no_mixture(folder: Path) -> None:
    report = fire(folder, seconds=3, readers=3, merged_cache_bytes=PLENTY)
    assert report.wrong_count == 0 and report.errors == [] and report.rows > 100, report


def forget_versions(session: SwitchableSession) -> None:
    """A merge is found by its customer alone."""
    assert session.merged is not None
    run = session.merged.run
    session.merged.run = lambda inputs, customer, digest, row: run(inputs, customer, "", row)  # type: ignore[method-assign]


@pytest.mark.slow
def test_a_merge_that_outlives_its_version_is_noticed(folder: Path) -> None:
    report = fire(folder, seconds=20, readers=3, merged_cache_bytes=PLENTY, sabotage=forget_versions)
    assert report.errors == [] and report.mixtures > 0, report


@pytest.mark.gpu
@pytest.mark.parametrize(("packed", "precision"), [(True, "fp16"), (False, "fp32")])
@pytest.mark.parametrize("buckets", [None, BUCKETS])
def test_on_cuda(packed: bool, precision: str, buckets: Buckets | None, tmp_path: Path, texts: Examples) -> None:
    tolerance = FP16_DEVICES if precision == "fp16" else FP32_ONNX
    try:
        folder = export(tmp_path, texts, provider="cuda", precision=precision, padding_free=packed)
    except ProviderError as error:
        pytest.skip(f"no CUDA execution provider here: {error}")
    bundle = open_bundle(folder)
    assert (bundle.packed is not None) == packed and bundle.alone is not None and verify(bundle, "cuda").passed
    session = open_session(folder, provider="cuda", buckets=buckets)
    check(session, open_session(folder, 0), tolerance)
    assert session.merged is not None and session.merged.merges == 7 and session.merged.hits == 2 * 7
    # A table that grows takes its heads with it.
    for number in range(80):
        session.load(f"d{number}", made_up_customer(session.manifest, number, None))
    check(session, open_session(folder, 0), tolerance)
    if precision == "fp16":
        # Its roundings are as large as what the fire tells versions by.
        return
    report = fire(folder, seconds=4, provider="cuda", buckets=buckets, merged_cache_bytes=PLENTY)
    assert report.wrong_count == 0 and report.errors == [] and report.rows > 100, report
