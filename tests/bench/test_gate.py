"""The gate: every rule passes a good report, and every one fails on its own kind of violation, by name."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from qrlora_deploy.bench.gate import judge
from qrlora_deploy.bench.gate_file import EXAMPLE, GateRules, labelled_data, read_gate
from qrlora_deploy.bench.measurements import compare, measurement_of
from qrlora_deploy.bench.report import Report
from qrlora_deploy.bench.report_parts import Gate, Measurement, Memory, Parity
from qrlora_deploy.errors import FileFormatError, InputError
from tests.bench.fixed import SHAPE, good_report, series

Mutation = Callable[[Report], Report]


def rules(text: str, folder: Path) -> GateRules:
    (folder / "gate.toml").write_text(text)
    return read_gate(folder / "gate.toml")


def judged(text: str, report: Report, folder: Path) -> Gate:
    return judge(report, rules(text, folder), "gate.toml")


def with_subject(**change: Any) -> Mutation:
    """The candidate with other facts."""
    return lambda report: report.model_copy(
        update={"subjects": [report.subjects[0], report.subjects[1].model_copy(update=change)]}
    )


def with_accuracy(**change: Any) -> Mutation:
    """The candidate's accuracy for bolt changed."""

    def mutate(report: Report) -> Report:
        found = [
            item.model_copy(update=change) if (item.subject, item.customer) == ("new", "bolt") else item
            for item in report.accuracy
        ]
        return report.model_copy(update={"accuracy": found})

    return mutate


def with_measurements(change: Callable[[Measurement], Measurement | None]) -> Mutation:
    """The candidate's measurements changed, or left out; the ratios follow."""

    def mutate(report: Report) -> Report:
        changed = [change(item) if item.subject == "new" else item for item in report.measurements]
        kept = [item for item in changed if item is not None]
        return report.model_copy(update={"measurements": kept, "comparisons": compare(kept, "old", 0)})

    return mutate


def single(seed: int, level_s: float, count: int = 500, windows: Sequence[float] | None = None) -> Mutation:
    """Other single runs of the candidate."""
    found = measurement_of("new", "single-stream", SHAPE, series(seed, level_s, count, windows))
    return with_measurements(lambda item: found if item.scenario == "single-stream" else item)


def without(scenario: str) -> Mutation:
    return with_measurements(lambda item: None if item.scenario == scenario else item)


def slower(scenario: str) -> Mutation:
    """Every percentile of a scenario twice as large."""

    def change(item: Measurement) -> Measurement:
        if item.scenario != scenario:
            return item
        doubled = {
            name: found.model_copy(update={"value": 2 * found.value, "low": 2 * found.low, "high": 2 * found.high})
            for name, found in item.percentiles.items()
        }
        return item.model_copy(update={"percentiles": doubled})

    return with_measurements(change)


def with_capacity(**change: Any) -> Mutation:
    return lambda report: report.model_copy(
        update={"capacities": [item.model_copy(update=change) for item in report.capacities]}
    )


def with_bolt(**change: Any) -> Mutation:
    """The file of bolt changed."""
    return lambda report: report.model_copy(
        update={"customers": [report.customers[0], report.customers[1].model_copy(update=change)]}
    )


P99 = '[[latency]]\nstatistic = "p99"\n'
P50 = '[[latency]]\nstatistic = "p50"\n'
CAPACITY = "[capacity]\nmin_requests_per_s = 50\np99_ms = 20\n"
BAD_PARITY = Parity(max_abs_error=0.1, bound=1e-4, label_agreement=0.8, effect_correlation=0.5, passed=False)
NO_LOGITS = BAD_PARITY.model_copy(update={"max_abs_error": None})
LARGE = Memory(host_peak_bytes=900_000_000, host_before_bytes=80_000_000, device_bytes=900_000_000)

CASES: list[tuple[str, str, str, Mutation]] = [
    # Rule, its name in the verdict, outcome, and what breaks it.
    (f"{P99}max_ms = 5", "latency.p99.max_ms", "failed", single(1, 8e-3)),
    (f"{P99}max_ms = 5", "latency.p99.max_ms", "unknown", single(1, 4e-3, count=300)),
    (f"{P99}max_ms = 5", "latency.p99.max_ms", "unknown", single(1, 4e-3, windows=[4e-3, 4e-3, 6e-3])),
    (f"{P99}max_ms = 5", "latency.p99", "unknown", without("single-stream")),
    (f"{P99}max_ratio = 1.1", "latency.p99.max_ratio", "failed", single(1, 5e-3)),
    (f"{P50}max_ratio = 1.05", "latency.p50.max_ratio", "failed", single(1, 4.4e-3)),
    (f"{P50}max_ratio = 1.05", "latency.p50.max_ratio", "unknown", single(1, 4.2e-3)),
    (f"{P50}max_ratio = 1.05", "latency.p50.max_ratio", "unknown", single(1, 4e-3, windows=[4e-3, 6e-3, 4e-3])),
    (f"{P50}max_ratio = 1.05", "latency.p50.max_ratio", "unknown", single(1, 4e-3, count=20)),
    (f'{P50}scenario = "idle-gap"\nmax_ms = 10', "latency.p50.max_ms", "failed", slower("idle-gap")),
    (f'{P50}scenario = "cold-start"\nmax_ms = 500', "latency.p50.max_ms", "failed", slower("cold-start")),
    ('[[throughput]]\nshape = "1x32"\nmin_rows_per_s = 150', "throughput", "unknown", without("offline")),
    ("[[throughput]]\nmin_ratio = 0.95", "throughput.min_ratio", "failed", lambda report: good_report(slower=1.2)),
    (
        '[[throughput]]\nshape = "1x32"\nmin_rows_per_s = 150',
        "throughput.min_rows_per_s",
        "failed",
        lambda report: good_report(slower=2.0),
    ),
    (CAPACITY, "capacity.min_requests_per_s", "failed", with_capacity(rate_per_s=30.0)),
    (CAPACITY, "capacity.min_requests_per_s", "failed", with_capacity(rate_per_s=None)),
    (CAPACITY, "capacity.min_requests_per_s", "unknown", with_capacity(rate_per_s=None, refused=368)),
    (CAPACITY, "capacity.min_requests_per_s", "unknown", with_capacity(budget_ms=50.0)),
    (CAPACITY, "capacity.min_requests_per_s", "unknown", lambda report: report.model_copy(update={"capacities": []})),
    ("[accuracy]\nmin = 0.8", "accuracy.min", "failed", with_accuracy(accuracy=0.7)),
    ("[accuracy]\nmin = 0.8", "accuracy", "unknown", with_accuracy(accuracy=None, error="no labels")),
    ("[accuracy]\nmin = 0.8", "accuracy", "unknown", lambda report: report.model_copy(update={"accuracy": []})),
    ("[accuracy]\nmax_drop = 0.0", "accuracy.max_drop", "failed", with_accuracy(base_accuracy=0.95)),
    ("[accuracy]\nmax_drop = 0.0", "accuracy.max_drop", "unknown", with_accuracy(base_accuracy=None)),
    (
        "[accuracy]\nmax_drop_to_reference = 0.01",
        "accuracy.max_drop_to_reference",
        "failed",
        with_accuracy(accuracy=0.88),
    ),
    ("[parity]\nmax_abs_error = 0.001", "parity.max_abs_error", "failed", with_subject(parity=BAD_PARITY)),
    ("[parity]\nmax_abs_error = 0.001", "parity.max_abs_error", "unknown", with_subject(parity=NO_LOGITS)),
    ("[parity]\nmin_label_agreement = 0.99", "parity.min_label_agreement", "failed", with_subject(parity=BAD_PARITY)),
    ("[size]\nmax_bundle_bytes = 100000000", "size.max_bundle_bytes", "failed", with_subject(size_bytes=200_000_000)),
    ("[size]\nmax_customer_bytes = 3000", "size.max_customer_bytes", "failed", with_bolt(size_bytes=9000)),
    ("[memory]\nmax_host_bytes = 300000000", "memory.max_host_bytes", "failed", with_subject(memory=LARGE)),
    ("[memory]\nmax_host_bytes = 300000000", "memory.max_host_bytes", "unknown", with_subject(memory=None)),
    ("[memory]\nmax_device_bytes = 300000000", "memory.max_device_bytes", "failed", with_subject(memory=LARGE)),
    ("[size]\nmax_bundle_bytes = 100000000", "customer", "failed", with_bolt(refused="bolt was trained on another")),
]


@pytest.mark.parametrize(("text", "rule", "outcome", "mutate"), CASES, ids=[f"{case[1]}-{case[2]}" for case in CASES])
def test_every_rule_passes_what_is_good_and_fails_what_is_not(
    text: str, rule: str, outcome: str, mutate: Mutation, tmp_path: Path
) -> None:
    good = judged(text, good_report(), tmp_path)
    assert good.passed and good.verdicts and all(good.customers.values()), good
    bad = judged(text, mutate(good_report()), tmp_path)
    broken = [verdict for verdict in bad.verdicts if verdict.outcome != "passed"]
    assert not bad.passed and {(verdict.rule, verdict.outcome) for verdict in broken} == {(rule, outcome)}, bad
    assert all(verdict.line and "\n" not in verdict.line for verdict in broken)


def test_a_customers_verdict_is_its_own(tmp_path: Path) -> None:
    found = judged("[accuracy]\nmin = 0.8", with_accuracy(accuracy=0.7)(good_report()), tmp_path)
    assert found.customers == {"acme": True, "bolt": False} and not found.passed
    line = next(verdict.line for verdict in found.verdicts if verdict.outcome == "failed")
    assert "new bolt" in line and "accuracy 0.7 < 0.8" in line


def test_the_reference_is_not_judged(tmp_path: Path) -> None:
    report = good_report()
    old = report.subjects[0].model_copy(update={"size_bytes": 10**12})
    found = judged(
        "[size]\nmax_bundle_bytes = 100000000",
        report.model_copy(update={"subjects": [old, report.subjects[1]]}),
        tmp_path,
    )
    assert found.passed and {verdict.subject for verdict in found.verdicts} == {"new"}


def test_a_ratio_is_judged_by_its_interval(tmp_path: Path) -> None:
    report = single(1, 4.2e-3)(good_report())
    ratio = next(item.ratio for item in report.comparisons if item.statistic == "p50")
    assert ratio.low < 1.05 < ratio.high
    for limit, outcome in ((ratio.high + 1e-4, "passed"), (ratio.value, "unknown"), (ratio.low - 1e-4, "failed")):
        found = judged(f"{P50}max_ratio = {limit}", report, tmp_path)
        assert [verdict.outcome for verdict in found.verdicts] == [outcome]


def test_a_report_of_another_machine_decides_nothing(tmp_path: Path) -> None:
    report = good_report()
    other = [item.model_copy(update={"caveat": "cpu a then, b now"}) for item in report.comparisons]
    found = judged(f"{P50}max_ratio = 2", report.model_copy(update={"comparisons": other}), tmp_path)
    assert {verdict.outcome for verdict in found.verdicts} == {"unknown"} and "cpu a then" in found.verdicts[0].line


def test_unstable_measurements_pass_only_where_that_is_allowed(tmp_path: Path) -> None:
    unsteady = single(1, 4e-3, windows=[4e-3, 4e-3, 6e-3])(good_report())
    found = judged(f"{P99}max_ms = 5", unsteady, tmp_path)
    assert not found.passed and "not stable" in found.verdicts[0].line
    assert judged(f"allow_unstable = true\n{P99}max_ms = 5", unsteady, tmp_path).passed


def test_the_example_is_read_and_named_data_found(tmp_path: Path) -> None:
    assert len(rules(EXAMPLE, tmp_path).latency) == 2
    everything = "\n".join(
        line.removeprefix("# ") if line.startswith(("# [", "# min", "# max", "# p99", "# acme")) else line
        for line in EXAMPLE.splitlines()
    )
    made = rules(everything, tmp_path)
    assert made.capacity is not None and made.accuracy is not None and made.accuracy.min == 0.8
    assert labelled_data(made, tmp_path / "gate.toml") == {"acme": tmp_path / "acme-test.tsv"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no rule in it"),
        ("[size]", "needs one of"),
        ("[size]\nmax_bundle = 3", "size.max_bundle: Extra inputs"),
        (f"{P99}max_ms = -1", "latency.0.max_ms: Input should be greater than 0"),
        (f"{P99}max_ms = nan", "latency.0.max_ms: Input should be"),
        (f'{P99}max_ms = 1\nshape = "8"', "latency.0.shape"),
        ('[[latency]]\nstatistic = "p90"\nmax_ratio = 1.1', "max_ratio is for the p50 and the p99"),
        ('[[latency]]\nstatistic = "mean"\nmax_ms = 1', "latency.0.statistic"),
        ("[size", "is not TOML"),
    ],
)
def test_a_wrong_gate_is_refused(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="gate.toml") as refused:
        rules(text, tmp_path)
    assert message in str(refused.value)


def test_a_missing_gate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_gate(tmp_path / "nowhere.toml")
