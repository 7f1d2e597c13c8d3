"""Rounds, load and a whole run: what is measured, counted and recorded. No time is asserted."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qrlora_deploy.bench.labelled import _share
from qrlora_deploy.bench.opening import open_subject
from qrlora_deploy.bench.report import Report, read_report, write_report
from qrlora_deploy.bench.report_parts import SCENARIOS
from qrlora_deploy.bench.rounds import MAX_RUNS, MIN_WINDOW, WARMUP_RUNS, Bounds, measure_latency, measure_throughput
from qrlora_deploy.bench.run import run_benchmark
from qrlora_deploy.bench.scenarios import _Repeating
from qrlora_deploy.bench.serving_load import RateSearch, Served, offer, poisson_arrivals
from qrlora_deploy.bench.settings import BenchSettings
from qrlora_deploy.bench.subjects import BundleSubject, Spec
from qrlora_deploy.bench.workload import Workload, text_workloads, token_inputs
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.errors import FileFormatError, InputError
from qrlora_deploy.io.files import digest_file
from qrlora_deploy.runtime.bundle.bundle import MANIFEST_FILE
from qrlora_deploy.tasks.classification import Classification
from tests.bench.fixed import good_report
from tests.tiny import SENTENCES


def counting(calls: list[str], name: str) -> Callable[[int], None]:
    return lambda _turn: calls.append(name)


def test_subjects_take_turns_in_random_order() -> None:
    order: list[str] = []
    both = {name: counting(order, name) for name in "ab"}
    found = measure_latency(both, Bounds(0.5, 100), np.random.default_rng(0))
    # The warm-up; then turns of one run that is not measured, and those that are.
    turns = order[2 * WARMUP_RUNS :]
    size = 1 + MAX_RUNS
    owners = turns[::size]
    assert all(turns[at : at + size] == [turns[at]] * size for at in range(0, len(turns), size))
    assert all(set(owners[at : at + 2]) == {"a", "b"} for at in range(0, len(owners), 2))
    assert {"a", "b"} == set(owners[::2])
    assert all(len(series.warmup) == WARMUP_RUNS for series in found.values())
    assert len(found["a"].samples) == len(found["b"].samples) == MAX_RUNS * len(owners) // 2 >= 100


def test_a_measurement_is_bounded() -> None:
    found = measure_latency({"a": lambda turn: None}, Bounds(1e-9, 1000), np.random.default_rng(0))
    assert len(found["a"].samples) == MAX_RUNS and not found["a"].stability.stable


def test_throughput_counts_the_rows() -> None:
    turns: list[int] = []
    found = measure_throughput({"a": turns.append}, 4, Bounds(0.5, MIN_WINDOW), np.random.default_rng(0))
    assert len(found["a"].warmup) == WARMUP_RUNS and min(found["a"].samples) > 0


def test_arrivals_are_poisson() -> None:
    gaps = np.diff(poisson_arrivals(50.0, 20_000, np.random.default_rng(0)))
    # Exponential gaps: mean and deviation are equal; 4 standard errors.
    assert gaps.mean() == pytest.approx(0.02, rel=4 / 20_000**0.5)
    assert gaps.std() == pytest.approx(0.02, rel=4 * 2**0.5 / 20_000**0.5)


def test_every_request_is_answered_once_and_waiting_counts() -> None:
    turns: list[int] = []
    latencies, cut = offer(turns.append, np.zeros(50), 3, 60.0)
    assert sorted(turns) == list(range(50)) and len(latencies) == 50 and not cut
    early, cut = offer(turns.append, np.full(5, -10.0), 1, 60.0)
    assert min(early) >= 10 and not cut
    _, cut = offer(turns.append, np.full(5, -10.0), 1, 1.0)
    assert cut


def test_what_a_request_raises_comes_through() -> None:
    def fail(turn: int) -> None:
        raise ValueError(f"request {turn}")

    with pytest.raises(ValueError, match="request 0"):
        offer(fail, np.zeros(5), 1, 60.0)


def test_threads_end_where_their_start_is_cut_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """As by a signal, after the thread has begun and before `start` returns."""
    start = threading.Thread.start

    def cut_short(thread: threading.Thread) -> None:
        start(thread)
        if thread.name in ("load-1", "swaps"):
            raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", cut_short)
    turns: list[int] = []

    def answer(turn: int) -> None:
        turns.append(turn)
        time.sleep(0.01)

    before = set(threading.enumerate())
    with pytest.raises(KeyboardInterrupt):
        offer(answer, np.zeros(100_000), 3, 1e9)
    assert set(threading.enumerate()) <= before and len(turns) < 1000
    with pytest.raises(KeyboardInterrupt), _Repeating(turns.append, 1000.0):
        raise AssertionError("it was never entered")
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


def test_the_search_of_a_rate() -> None:
    search = RateSearch(100.0, 1.0, 8)
    while (rate := search.next_rate()) is not None:
        search.tell(Served(rate, [0.5 if rate < 70 else 2.0] * 400, False))
    assert search.bounded and search.rate_per_s == pytest.approx(70, abs=100 / 2**8)
    unsure = RateSearch(100.0, 1.0, 8)
    unsure.tell(Served(50.0, [0.5] * 100, False))
    assert unsure.next_rate() is None and unsure.refused == 368 and unsure.rate_per_s is None and not unsure.bounded


def test_tokens_are_never_padding() -> None:
    made = token_inputs(Workload(64, 32), ["input_ids", "attention_mask"], 50, 7)
    assert made["input_ids"].shape == (64, 32) and (made["input_ids"] != 7).all() and made["attention_mask"].all()


def test_texts_keep_their_lengths(exported: Path) -> None:
    workload = text_workloads((1,), SENTENCES, None, 0)[0]
    subject = BundleSubject(Spec("acme", "candidate", "bundle", exported, threads=1), [workload])
    call = subject.prepare(workload)
    assert {len(batch) for batch in workload.texts} == {1} and call(0).shape == (1, 4)


def test_rows_of_a_batch_are_different_customers(switchable: Path, customers: Path) -> None:
    shape = Workload(3, 8)
    spec = Spec("all", "candidate", "bundle", switchable, threads=1, folder=customers)
    subject = BundleSubject(spec, [shape])
    assert subject.owners(3) == ["acme", "bolt", "acme"]
    assert "stranger" in subject.refused and "eeee" in subject.refused["stranger"]
    mixed, _ = subject.prepare(shape)(0)
    base, _ = BundleSubject(replace(spec, mix="base"), [shape]).prepare(shape)(0)
    assert all(not np.array_equal(one, other) for one, other in zip(mixed, base, strict=True))


def test_a_whole_run(settings: BenchSettings, measured: Report, exported: Path) -> None:
    assert [subject.name for subject in measured.subjects] == ["acme", "switchable"]
    assert measured.subjects[0].digest == digest_file(exported / MANIFEST_FILE)
    assert all(subject.provider == "CPUExecutionProvider" for subject in measured.subjects)
    assert all(subject.parity and subject.parity.passed and subject.memory for subject in measured.subjects)
    assert {item.scenario for item in measured.measurements} == set(SCENARIOS)
    for item in measured.measurements:
        assert (item.samples or item.saturated) and set(item.percentiles) & set(item.refused) == set()
    single = list(measured.of("single-stream"))
    assert {(item.subject, item.shape) for item in single} == {
        (name, shape) for name in ("acme", "switchable") for shape in ("1x8", "2x8")
    }
    assert all(len(item.samples) >= MAX_RUNS and item.stable is not None for item in single)
    assert {item.variant for item in measured.of("swap")} == {"no swaps", "with swaps", "swap"}
    assert {(item.subject, item.baseline) for item in measured.comparisons} <= {("switchable", "acme")}
    refused = {customer.name: bool(customer.refused) for customer in measured.customers}
    assert refused == {"acme": False, "bolt": False, "stranger": True}
    assert not measured.environment.tf32 and "onnxruntime-gpu" in measured.environment.versions


def test_accuracy_is_that_of_the_predictions(
    measured: Report, switchable: Path, customers: Path, labelled: Path
) -> None:
    found = {(item.subject, item.customer): item for item in measured.accuracy}
    assert set(found) == {("acme", "acme"), ("switchable", "acme"), ("switchable", "bolt")}
    assert found["acme", "acme"].accuracy == found["switchable", "acme"].accuracy
    spec = Spec("all", "candidate", "bundle", switchable, threads=1, folder=customers)
    subject = BundleSubject(spec, [])
    rows = [line.split("\t") for line in (labelled / "bolt.tsv").read_text().splitlines()[1:]]
    answers = subject.answer([row[0] for row in rows], None, "bolt")
    right = sum(answer == (row[1],) for answer, row in zip(answers, rows, strict=True))
    assert found["switchable", "bolt"].accuracy == right / len(rows)


def test_a_report_is_read_as_it_was_written(measured: Report, tmp_path: Path) -> None:
    write_report(measured, tmp_path / "report.json")
    assert read_report(tmp_path / "report.json") == measured
    text = (tmp_path / "report.json").read_text()
    for wrong, message in (
        (text[:-20], "is not JSON"),
        (text.replace('"format_version":1', '"format_version":9'), "has format version 9; this version reads 1"),
        (text.replace('"settings":', '"sittings":'), "settings: Field required"),
        ("[]", "is not a report of bench"),
    ):
        (tmp_path / "wrong.json").write_text(wrong)
        with pytest.raises(FileFormatError, match=message):
            read_report(tmp_path / "wrong.json")


def test_an_earlier_report_is_a_reference(settings: BenchSettings, measured: Report, tmp_path: Path) -> None:
    other = measured.environment.model_copy(update={"host": measured.environment.host | {"cpu": "another"}})
    write_report(measured.model_copy(update={"environment": other}), tmp_path / "before.json")
    short = replace(settings, bundles=settings.bundles[:1], customers=None, labelled=None, scenarios=("single-stream",))
    found = run_benchmark(replace(short, reference=tmp_path / "before.json"))
    assert {item.baseline for item in found.comparisons} == {"earlier report"}
    assert not any(item.paired for item in found.comparisons)
    assert any("another machine: cpu another then" in note for note in found.notes)


def test_wrong_plans_name_the_option(settings: BenchSettings, exported: Path) -> None:
    for change, message in (
        ({"bundles": ()}, "at least one bundle"),
        ({"batches": (0,)}, "batches must be at least 1"),
        ({"cuda_graph": "on"}, "cuda_graph='on' needs provider='cuda'"),
        ({"peers": ("peft",)}, r"peers=\('peft',\) needs base"),
        ({"data": exported}, "lengths and data exclude each other"),
    ):
        with pytest.raises(InputError, match=message):
            replace(settings, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes at most 64 tokens"):
        run_benchmark(replace(settings, lengths=(65,)))
    with pytest.raises(InputError, match="customers is for switchable bundles"):
        run_benchmark(replace(settings, bundles=settings.bundles[:1]))


def test_peers_run_beside_the_bundles(tiny_base: Path, exported: Path) -> None:
    shape = Workload(2, 8)
    kinds = ("torch-eager", "peft")
    specs = [Spec(kind, "peer", kind, tiny_base, threads=1, targets=("query", "value")) for kind in kinds]
    eager, mixed = (open_subject(spec, [shape]) for spec in specs)
    plain, adapted = eager.prepare(shape)(0), mixed.prepare(shape)(0)
    assert plain.shape == adapted.shape == (2, 4) and not np.allclose(plain, adapted, rtol=1e-3, atol=1e-3)
    assert "8 LoRA of rank 8" in mixed.record.options["adapters"]


def test_a_report_made_for_tests_is_valid() -> None:
    assert Report.model_validate(good_report().model_dump()) == good_report()


@pytest.mark.parametrize(
    ("names", "found", "expected", "share"),
    [
        (("1", "2"), ["1", "2", "2"], ["1.0", "2", "1.0"], 2 / 3),
        (("false", "true"), ["true", "false"], ["True", "True"], 0.5),
        (("LABEL_0", "LABEL_1"), ["LABEL_1", "LABEL_0"], ["1", "LABEL_0"], 1.0),
        (("a", "b"), ["a", "b"], ["b", "unknown"], 0.0),
    ],
)
def test_answers_and_labels_may_be_spelt_otherwise(
    names: tuple[str, ...], found: list[str], expected: list[str], share: float
) -> None:
    answers, rows = [(name,) for name in found], Examples(["text"] * len(expected), None, expected, "some.tsv")
    assert _share(Classification(), answers, rows, names) == share
