"""What the tables say of records: made-up ones, whose answers are known."""

from typing import Any

import pytest

from benchmarks.fleet.__main__ import ALONE, CUSTOMARY, LOOP, TRAINER, compare
from benchmarks.fleet.peers import Cost
from benchmarks.gpu import aims, figures
from benchmarks.gpu.aims import Aim, Bar, make_bar
from benchmarks.gpu.page import machine_of
from benchmarks.gpu_graph.__main__ import geometric_means
from benchmarks.training_speed.__main__ import ratios


def bars(kind: str, record: dict[str, Any]) -> list[Bar]:
    return list(aims.READERS[kind](record))


def found(rows: list[Bar], *words: str) -> Bar:
    """The one bar whose text has all of the words."""
    chosen = [row for row in rows if all(word in row.what for word in words)]
    assert len(chosen) == 1, [row.what for row in rows]
    return chosen[0]


@pytest.mark.parametrize(
    ("side", "value", "met"),
    [("least", 2.0, True), ("least", 1.99, False), ("most", 2.0, True), ("most", 2.01, False), ("most", None, None)],
)
def test_an_aim_is_met_at_its_limit(side: str, value: float | None, met: bool | None) -> None:
    row = make_bar("speed", value, Aim(side, 2.0, " times", "because"), "of 5")
    assert row.met is met and row.aim == f"at {side} 2 times"
    assert row.why == {True: "", False: "because", None: "the record does not hold it"}[met]


FACTORIZATION = {
    "cases": {
        "2x8 gaussian": {
            "median_ms": {"pivoted_qr": 4.0},
            "times_ours": {"torch.linalg.svd": 1000.0, "torch.linalg.qr": 0.125},
        },
        "2x8 three decades": {"median_ms": {"pivoted_qr": 5.0}},
    },
    "project": {"matrices": 3, "columns": 16, "median_s": 1e-3, "samples_s": [1e-3, 1e-3]},
}


def test_bars_of_the_factorization() -> None:
    rows = bars("factorization", FACTORIZATION)
    faster = found(rows, "2 × 8²", "`torch.linalg.svd`")
    assert (faster.value, faster.met, faster.found, faster.why) == (1000.0, True, "1,000 times (4 ms)", "")
    # The record says how many times our time the unpivoted one takes; the table says it the other way round.
    unpivoted = found(rows, "2 × 8²", "unpivoted")
    assert (unpivoted.value, unpivoted.met, unpivoted.found) == (8.0, False, "8 times (4 ms)") and unpivoted.why
    assert found(rows, "`geqp3`").met is None
    assert found(rows, "3 projections of 16²").found == "0.001 s (2 runs)"
    assert not [row for row in rows if "three decades" in row.what]
    assert list(figures.READERS["factorization"](FACTORIZATION)) == [("pivoted QR, 2 × 8², three decades", "5 ms")]


def graph_record(**medians: tuple[float, float]) -> dict[str, Any]:
    """Of two batches: by name, the medians of both in milliseconds, on the device; four times that host to host."""
    batches = []
    for index, (batch, length) in enumerate(((1, 8), (2, 16))):
        columns = {
            column: {name: {"p50": times * both[index]} for name, both in medians.items()}
            for column, times in (("device_ms", 1.0), ("whole_ms", 4.0))
        }
        batches.append({"batch": batch, "length": length, **columns})
    return {"shape": "roberta", "batches": batches, "geometric_means": geometric_means(batches)}


def test_bars_of_merged_graphs() -> None:
    record = graph_record(**{"torch.compile": (1.0, 8.0), "padded": (4.0, 32.0), "padding-free": (0.25, 1.0)})
    rows = bars("graph", record)
    padded, free = (found(rows, f", {name}, 1 × 8, 2 × 16") for name in ("padded", "padding-free"))
    # Geometric means of 4 and 4, and of 1/4 and 1/8.
    assert padded.value == pytest.approx(4.0) and padded.met is False and padded.why == aims.WHY_PADDED
    assert free.value == pytest.approx(2**-2.5) and free.met is True and "0.177 host to host" in free.found
    shown = dict(figures.READERS["graph"](record))
    assert shown["padded, RoBERTa-base's shape, 1 × 8 / 2 × 16"] == "4 / 32 ms"


def test_a_graph_that_left_out_a_batch_has_no_mean() -> None:
    record = graph_record(**{"torch.compile": (1.0, 1.0), "padded": (1.0, 1.0), "padding-free": (1.0, 1.0)})
    del record["batches"][1]["device_ms"]["padded"]
    record["geometric_means"] = geometric_means(record["batches"])
    padded, free = bars("graph", record)
    assert (padded.value, padded.met) == (None, None) and free.value == pytest.approx(1.0)


def test_bars_of_switchable_graphs() -> None:
    record = graph_record(
        **{
            "padded": (1.0, 1.0),
            "padding-free": (2.0, 2.0),
            "paper, padding-free": (2.0, 2.0),
            "qv of 12, padding-free": (8.0, 2.0),
            "qv of 12, padding-free, apart": (18.0, 2.0),
        }
    )
    rows = bars("switchable", record)
    paper, all_layers = (found(rows, name, ", padding-free") for name in ("query of the last 4", "q and v of all 12"))
    assert paper.value == pytest.approx(1.0) and paper.met is True
    # Geometric means of 4 and 1, and of 9 and 1.
    assert all_layers.value == pytest.approx(2.0) and all_layers.met is False and "operators" in all_layers.why
    assert all_layers.found == "2 (3 with branches apart from their layers' products)"
    # Without the graph that it is about, a line says so.
    missing = found(rows, "query of the last 4", ", padded")
    assert (missing.value, missing.met, missing.found) == (None, None, "not measured")


def table_record(busy_us: float, throughput: dict[str, Any] | None) -> dict[str, Any]:
    look = {"p50": 7.0}
    return {
        "customers": 5000,
        "batch": 8,
        "loading": {"gigabytes_per_second": 1000.0, "file_bytes": 2e9, "file_in": "/dev/shm", "seconds": 4.0},
        "runs": {
            "ratio_all_to_few": {"the same": {"value": 0.5}, "random": None},
            "look_up_us": {"few, random": look, "all, random": {"p50": 20.0}},
            "latency_ms": {"all, random": {"p50": 3.0}},
        },
        "swaps": {"idle_us": {"always the same": {"p50": 2.0, "p99": 6.0}}},
        "beside": {"swap_us": {"p50": busy_us, "p99": 1e-3}, "ratio": {"value": 0.5}},
        **({"throughput": throughput} if throughput else {}),
    }


def test_bars_of_the_table() -> None:
    rows = bars("table", table_record(1e6, {"ratio_all_to_few": {"value": 2.0}}))
    expected: dict[str, tuple[float | None, bool | None]] = {
        "cold-start load": (1000.0, True),
        "run with all / with 100, same": (0.5, True),
        "run with all / with 100, random": (None, None),
        "throughput with all": (2.0, True),
        "swap while busy, p50": (1e6, False),
        "swap while busy, p99": (1e-3, True),
        "throughput with swaps": (0.5, False),
    }
    for what, (value, met) in expected.items():
        row = found(rows, "5,000 customers", what)
        assert (row.value, row.met) == (value, met), what
    busy = found(rows, "swap while busy, p50")
    assert busy.found == "1,000,000 µs" and "p50 is 2 µs and p99 6 µs" in busy.why
    assert found(rows, "cold-start load").found == "1,000 GB/s"
    # An early record without windows of both.
    assert found(bars("table", table_record(1.0, None)), "throughput with all").met is None


def test_figures_of_the_table() -> None:
    shown = dict(figures.READERS["table"](table_record(1.0, None)))
    assert shown == {
        "loading 5,000 customers from one packed file of 2 GB in /dev/shm": "4 s",
        "a run, all, random": "3 ms, of which look-up 20 µs",
        "a swap on an idle device, always the same": "2 µs, p99 6 µs",
    }


def test_bars_of_training() -> None:
    """The median over rounds of the ratios, which is not the ratio of the medians."""
    rounds = {"ours, cached trunk": [1.0, 2.0, 4.0], aims.LOOP: [100.0, 20.0, 60.0], aims.TRAINER: [3.0, 6.0, 12.0]}
    subjects = {name: {"rounds_ms": times, "cpu_ms": 1.0, "steps_per_s": 5.0} for name, times in rounds.items()}
    record = {"shape": "mpnet", "data": {"texts": {"subjects": subjects, "times": ratios(subjects)}}}
    (row,) = bars("training", record)
    assert (row.value, row.met) == (15.0, True) and row.found == "15 times (3 by its Trainer)"
    assert ("training, mpnet, texts, ours, cached trunk", "5 steps/s") in figures.READERS["training"](record)


def test_bars_of_fleets() -> None:
    """Three fleets of ten customers take 10, 20 and 90 s: 2 s each, beside 1000, 3 and 8 s of the others."""
    others = {
        LOOP: [Cost(1000.0, 1.0)],
        CUSTOMARY: [Cost(3.0, 1.0)],
        TRAINER: [Cost(8.0, 1.0)],
        ALONE: [Cost(9.0, 1.0)],
    }
    record = compare(10, [Cost(seconds, 1.0) for seconds in (10.0, 90.0, 20.0)], others)
    record["options"] = {"customers": "10", "shape": "mpnet", "targets": "linear"}
    same, customary = bars("fleet", record)
    assert (same.value, same.met, same.found) == (500.0, True, "500 times (1,800 an hour, 4 times its Trainer)")
    assert (customary.value, customary.met) == (1.5, False) and "docs/fleets.md" in customary.why
    assert ("customers an hour, mpnet, linear targets, train", "400") in figures.READERS["fleet"](record)


def test_figures_that_have_no_aim() -> None:
    swap = {"batch": 2, "length": 8, "model": "tiny", "latency_us": {"swap from memory": {"p50": 30.96, "p99": 5.0}}}
    assert list(figures.READERS["swap"](swap)) == [("swap from memory, 2 × 8, tiny", "31 µs, p99 5 µs")]
    shape = {
        "batch": 2,
        "length": 8,
        "latency_ms": {"peft mixed": {"p50": 50.0}},
        "ratio_to_merged": {"peft mixed": 15},
    }
    mixed = {"model": "tiny", "precision": "fp16", "shapes": [shape]}
    assert list(figures.READERS["mixed"](mixed)) == [
        ("mixed batch, 2 × 8, tiny, fp16, peft mixed", "50 ms, 15 of merged")
    ]
    one = {"scenario": "single-stream", "batch": 2, "length": 8, "subject": "merged", "unit": "ms"}
    median = {"percentiles": {"p50": {"value": 4.25}}}
    report = {"settings": {"mix": "one"}, "measurements": [one | median, one, one | median | {"scenario": "offline"}]}
    assert list(figures.READERS["report"](report)) == [("`bench`, 2 × 8, one customer, merged", "4.25 ms")]


@pytest.mark.parametrize(
    ("record", "device"),
    [
        # As bench writes it, as these benchmarks do on each device, and with no part of its own.
        ({"environment": {"date": "2026-01-02T03:04:05+00:00", "gpus": [{"name": "A"}, {"name": "B"}]}}, "A, B"),
        ({"environment": {"date": "2026-01-02T03:04:05+00:00", "gpus": [{"name": "A"}], "device": "cpu"}}, "cpu"),
        ({"date": "2026-01-02", "device": "A"}, "A"),
        ({"date": "2026-01-02", "gpus": []}, "cpu"),
    ],
)
def test_a_machine_is_found_in_every_record(record: dict[str, Any], device: str) -> None:
    assert (machine_of(record).device, machine_of(record).date) == (device, "2026-01-02")
