"""The GPU benchmark: its table says what the records say, and no part that fails or hangs costs another."""

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import aims, figures
from benchmarks.gpu.aims import Aim, Bar, make_bar
from benchmarks.gpu.parts import Part, failed_checks, make_parts
from benchmarks.gpu.running import Ledger

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"

STAND_IN = """
import json, pathlib, subprocess, sys, time
what, output = sys.argv[1], pathlib.Path(sys.argv[-1])
with (pathlib.Path(__file__).parent / "runs.txt").open("a") as file:
    file.write(f"{output.stem} {what}\\n")
print("begun", flush=True)
if what == "hang":
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (pathlib.Path(__file__).parent / "child.txt").write_text(str(child.pid))
    time.sleep(600)
if what == "fail":
    raise SystemExit("out of memory, say")
batch = {"batch": 1, "length": 8, "failed": {"padded": "logits are 1 off"}, "device_ms": {}}
environment = {"date": "2026-01-02", "device": "stand-in", "versions": {"torch": "9"}}
record = {"environment": environment, "batch": 1, "length": 8, "model": "m", "shape": "s", "geometric_means": {}}
figures = {"run": {"p50": 1234.0, "p99": 2.0}}
if what != "silent":
    output.write_text(json.dumps(record | {"latency_us": figures, "batches": [batch] if what == "wrong" else []}))
"""


def stand_in(name: str, what: str, **changes: Any) -> Part:
    """A part of the kind of `name` that does `what`."""
    return Part(name, f"title of {name}", "gpu_stand_in", (what,), **({"seconds": 1.0} | changes))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Runs the command with these parts in the place of the real ones."""
    (tmp_path / "gpu_stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))

    def run(parts: list[Part], *options: str) -> int:
        monkeypatch.setattr(gpu, "make_parts", lambda *_: tuple(parts))
        return gpu.main(["-o", str(tmp_path / "out"), "--device", "cpu", "--quick", *options])

    return run


def runs(folder: Path) -> list[str]:
    """What the stand-ins were asked for, in their order."""
    path = folder / "runs.txt"
    return path.read_text().splitlines() if path.is_file() else []


def stored(kind: str, name: str) -> tuple[dict[str, Any], list[Bar]]:
    """A record that is published, and its bars."""
    record = json.loads((RESULTS / f"{name}.json").read_text())
    return record, list(aims.READERS[kind](record))


def found(rows: list[Bar], *words: str) -> Bar:
    """The one bar whose text has all of the words."""
    chosen = [row for row in rows if all(word in row.what for word in words)]
    assert len(chosen) == 1, [row.what for row in rows]
    return chosen[0]


def test_bars_of_the_factorization() -> None:
    record, rows = stored("factorization", "gpu_h100/factorization")
    for case, size in (("24x768 gaussian", "24 × 768²"), ("8x4096 gaussian", "8 × 4096²")):
        ms = {name: median(samples) for name, samples in record["cases"][case]["samples_ms"].items()}
        for peer in ("torch.linalg.svd", "geqp3"):
            row = found(rows, size, f"`{peer}`")
            assert row.value == pytest.approx(ms[peer] / ms["pivoted_qr"], rel=1e-12) and row.met is True
        row = found(rows, size, "unpivoted")
        assert row.value == pytest.approx(ms["pivoted_qr"] / ms["torch.linalg.qr"], rel=1e-12) and row.met is True
    row = found(rows, "64 projections of 4096²")
    assert row.value == median(record["project"]["samples_s"])
    assert row.met is True and row.found == "1.351 s (5 runs)" and row.aim == "at most 2 s" and not row.why
    missed = found(stored("factorization", "factorization_h200_peers")[1], "64 projections")
    assert missed.met is False and missed.found == "2.42 s (5 runs)" and missed.why
    assert len(rows) == 7


def test_bars_of_the_graphs() -> None:
    record, rows = stored("graph", "gpu_h100/graph-roberta")
    for packing in ("padded", "padding-free"):
        ratios = [
            batch["device_ms"][packing]["p50"] / batch["device_ms"]["torch.compile"]["p50"]
            for batch in record["batches"]
        ]
        row = found(rows, f", {packing},", "1 × 128, 8 × 128, 64 × 128, 64 × 384")
        assert row.value == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-12)
        assert row.met is True and row.aim == "at most 0.9"
    record, rows = stored("switchable", "gpu_h100/switchable-mpnet")
    for setup, layers, limit in (
        ("qv of 12", "q and v of all 12 layers", 1.08),
        ("paper", "query of the last 4", 1.01),
    ):
        for packing in ("padded", "padding-free"):
            name = f"{setup}, {packing}"
            ratios = [b["device_ms"][name]["p50"] / b["device_ms"][packing]["p50"] for b in record["batches"]]
            row = found(rows, layers, f", {packing}")
            assert row.value == pytest.approx(math.prod(ratios) ** (1 / len(ratios)), rel=1e-12)
            assert row.met is False and row.aim == f"at most {limit}" and "operators" in row.why
            assert "apart from their layers' products" in row.found
    # Without the graph that it is about, a line says so.
    for means in record["geometric_means"]["device_ms"].values():
        means.pop("paper, padded", None)
    row = found(list(aims.READERS["switchable"](record)), "query of the last 4", ", padded")
    assert (row.value, row.met, row.aim) == (None, None, "at most 1.01")


def test_bars_of_the_table() -> None:
    record, rows = stored("table", "gpu_h100/table")
    expected: dict[str, tuple[float | None, bool | None]] = {
        "cold-start load": (record["loading"]["file_bytes"] / record["loading"]["seconds"] / 1e9, True),
        "run with all / with 100, same": (record["runs"]["ratio_all_to_few"]["the same"]["value"], True),
        "run with all / with 100, random": (record["runs"]["ratio_all_to_few"]["random"]["value"], False),
        "throughput with all": (record["throughput"]["ratio_all_to_few"]["value"], False),
        "swap while busy, p50": (record["beside"]["swap_us"]["p50"], False),
        "swap while busy, p99": (record["beside"]["swap_us"]["p99"], False),
        "throughput with swaps": (record["beside"]["ratio"]["value"], True),
    }
    for what, (value, met) in expected.items():
        row = found(rows, "10,000,000 customers", what)
        # The record holds gigabytes per second in three decimals.
        assert row.value == (None if value is None else pytest.approx(value, abs=2e-3)) and row.met is met
    row = found(rows, "swap while busy, p50")
    assert row.found == "47.6 µs" and "at this rate p50 is 41.4 µs" in row.why and "ten at a time" in row.why
    assert len(rows) == len(expected)


def test_bars_of_training() -> None:
    record, rows = stored("training", "gpu_h100/training")
    subjects = next(iter(record["data"].values()))["subjects"]
    ours, loop = (subjects[name]["rounds_ms"] for name in ("ours, cached trunk", "PEFT LoRA, bare loop"))
    assert rows[0].value == pytest.approx(median(b / a for a, b in zip(ours, loop, strict=True)), rel=1e-12)
    assert rows[0].met is True and rows[0].aim == "at least 3 times"


@pytest.mark.parametrize("name", ["gpu_h100/fleet", "gpu_h100/fleet-linear"])
def test_bars_of_fleets(name: str) -> None:
    record, rows = stored("fleet", name)
    seconds = median(one["seconds"] for one in record["fleet"]["runs"]) / int(record["options"]["customers"])
    others = record["others_extrapolated_from_samples"]
    peers = ("PEFT LoRA, plain loop", "PEFT LoRA on q and v of all layers, plain loop")
    for row, peer in zip(rows, peers, strict=True):
        assert row.value == pytest.approx(median(one["seconds"] for one in others[peer]["runs"]) / seconds, rel=1e-12)
        assert row.met is True and row.aim == "at least 20 times"
    others[peers[0]]["fleet_times"] = 19.9
    missed, other = aims.READERS["fleet"](record)
    assert missed.met is False and "docs/fleets.md" in missed.why and other.met is True


@pytest.mark.parametrize(
    ("side", "value", "met"),
    [("least", 2.0, True), ("least", 1.99, False), ("most", 2.0, True), ("most", 2.01, False), ("most", None, None)],
)
def test_an_aim_is_met_at_its_limit(side: str, value: float | None, met: bool | None) -> None:
    row = make_bar("speed", value, Aim(side, 2.0, " times", "because"), "of 5")
    assert row.met is met and row.aim == f"at {side} 2 times"
    assert row.why == {True: "", False: "because", None: "the record does not hold it"}[met]


def test_figures_that_have_no_aim() -> None:
    rows: dict[str, str] = {}
    for kind, name in (
        ("swap", "gpu_h100/swap"),
        ("mixed", "gpu_h100/mixed-fp16"),
        ("report", "gpu_h100/report_fp16"),
        ("factorization", "gpu_h100/factorization"),
    ):
        rows |= dict(figures.READERS[kind](json.loads((RESULTS / f"{name}.json").read_text())))
    # As the README quotes them.
    assert rows["swap from memory, 8 × 128, roberta-base"] == "24 µs, p99 58.5 µs"
    assert rows["mixed batch, 64 × 128, roberta-base, fp16, peft mixed"].startswith("60 ms")
    assert rows["`bench`, 64 × 128, different customers, switchable-fp16 (CUDA graph)"] == "4.27 ms"
    assert rows["pivoted QR, 8 × 4096², three decades"] == "344 ms"


def test_a_failing_part_stops_no_other(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        stand_in("fleet", "fail"),
        stand_in("training", "silent"),
        stand_in("graph-x", "wrong", needs=("padded",)),
        stand_in("swap", "good"),
    ]
    assert run(parts) == 1
    output, errors = capsys.readouterr()
    assert runs(tmp_path) == ["fleet fail", "training silent", "graph-x wrong", "swap good"]
    assert "fleet failed: exit code 1: out of memory, say\n" in errors
    assert "training failed: ended without writing training.json\n" in errors
    assert "graph-x failed: a check failed: 1x8 padded: logits are 1 off\n" in errors
    assert "swap" not in errors
    assert "[swap] begun" in output
    out = tmp_path / "out"
    assert (out / "logs" / "fleet.log").read_text() == "begun\nout of memory, say\n"
    assert not (out / "fleet.json").exists() and (out / "swap.json").is_file()
    table = (out / "gpu.md").read_text()
    assert table in output
    assert "| fleet: title of fleet | not measured |  | -: failed: exit code 1: out of memory, say |" in table
    assert "| run, 1 × 8, m | 1,234 µs, p99 2 µs |" in table
    assert "- stand-in, 2026-01-02 (torch 9): graph-x, swap" in table
    # What failed comes after what was never tried, and what is done is left alone.
    (tmp_path / "runs.txt").unlink()
    parts = [*parts[:1], stand_in("mixed-x", "silent"), parts[3]]
    assert run(parts) == 1
    assert runs(tmp_path) == ["mixed-x silent", "fleet fail"]


def test_what_is_done_is_not_run_again(run: Callable[..., int], tmp_path: Path) -> None:
    parts = [stand_in("swap", "good"), stand_in("swap-b", "good")]
    assert run(parts) == 0 and len(runs(tmp_path)) == 2
    written = (tmp_path / "out" / "swap.json").stat().st_mtime_ns
    assert run(parts) == 0 and len(runs(tmp_path)) == 2
    assert (tmp_path / "out" / "swap.json").stat().st_mtime_ns == written
    (tmp_path / "out" / "swap-b.json").unlink()
    assert run(parts, "--only", "swap") == 0 and len(runs(tmp_path)) == 2
    assert "swap-b: title of swap-b | not measured" in (tmp_path / "out" / "gpu.md").read_text()
    assert run(parts) == 0 and runs(tmp_path)[2:] == ["swap-b good"]
    # Other options mean another record; one that fails must not leave the old one.
    assert run([stand_in("swap", "silent"), parts[1]]) == 1 and runs(tmp_path)[3:] == ["swap silent"]
    assert not (tmp_path / "out" / "swap.json").exists()


def test_a_budget_is_kept(run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [stand_in("fleet", "good", seconds=500.0), stand_in("swap", "good")]
    assert run(parts, "--budget-seconds", "60") == 1
    assert runs(tmp_path) == ["swap good"]
    output, errors = capsys.readouterr()
    assert "fleet: takes about 500 s, more than the 5" in output
    assert errors == "fleet is left to the next run\n"
    assert "| fleet: title of fleet | not measured |  | -: it was not run yet |" in output
    start = time.monotonic()
    assert run([stand_in("fleet", "hang"), parts[1]], "--budget-seconds", str(gpu.MARGIN_S + 3)) == 1
    assert time.monotonic() - start < 60
    assert "when the budget was spent" in capsys.readouterr().err
    child = int((tmp_path / "child.txt").read_text())
    for _ in range(100):
        if not _alive(child):
            break
        time.sleep(0.05)
    assert not _alive(child)


def _alive(process: int) -> bool:
    """Whether it runs; what was killed and nobody waits for does not."""
    status = Path(f"/proc/{process}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_record_of_another_form_costs_only_its_line(run: Callable[..., int], tmp_path: Path) -> None:
    assert run([stand_in("table", "good"), stand_in("swap", "good")]) == 0
    table = (tmp_path / "out" / "gpu.md").read_text()
    assert "| table: title of table | not measured |  | -: its record has another form: KeyError 'runs' |" in table
    assert "| run, 1 × 8, m | 1,234 µs" in table


def test_failed_checks_are_those_of_what_the_product_writes() -> None:
    part = stand_in("graph-x", "", needs=("padded", "padding-free"))
    batch = {"batch": 8, "length": 128, "failed": {"varlen": "no kernel"}, "device_ms": {"padded": {}}}
    assert failed_checks(part, {"batches": [batch]}) == ["8x128 padding-free: was not exported, see the log"]
    batch["device_ms"] = {"padded": {}, "padding-free": {}}
    assert failed_checks(part, {"batches": [batch]}) == []
    parity = {"max_abs_error": 0.2, "bound": 0.01, "passed": False}
    subjects = [{"name": "a", "parity": parity}, {"name": "b", "parity": parity | {"passed": True}}, {"name": "torch"}]
    assert failed_checks(part, {"subjects": subjects}) == ["a: max abs error 2.0e-01 > 1.0e-02"]


def script(module: str) -> str:
    """The module that `python -m` runs."""
    spec = importlib.util.find_spec(module)
    assert spec is not None
    return f"{module}.__main__" if spec.submodule_search_locations else module


@pytest.mark.parametrize(("device", "quick"), [("cuda", False), ("cuda", True), ("cpu", True)])
def test_the_scripts_take_their_options(device: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Parsed(Exception):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(parser: argparse.ArgumentParser) -> None:
        raise Parsed(parse(parser))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    parts = make_parts(device, quick)
    assert len({part.name for part in parts}) == len(parts)
    for part in parts:
        # A machine commonly ends a command after 600 s.
        assert 0 < part.seconds < 300
        command = part.command(Path("out"))
        monkeypatch.setattr(sys, "argv", command[2:])
        with pytest.raises(Parsed) as parsed:
            importlib.import_module(script(part.module)).main()
        options = vars(parsed.value.args[0])
        assert device == (options.get("provider") or options["device"])
        assert Path("out") in (options.get("out", options.get("output")) or Path()).parents


def test_bad_input_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["-o", str(tmp_path), "--only", "tables"]) == 2
    assert "--only tables: no such part; there are factorization, graph-roberta" in capsys.readouterr().err
    for options in ([], ["-o", str(tmp_path), "--device", "cpu"]):
        with pytest.raises(SystemExit) as stopped:
            gpu.main(options)
        assert stopped.value.code == 2
    (tmp_path / "parts.json").write_text('{"swap": 1}')
    assert gpu.main(["-o", str(tmp_path), "--device", "cpu", "--quick", "--only", "swap"]) == 2
    assert "parts.json is no list of parts of this benchmark" in capsys.readouterr().err


def test_the_list_says_what_is_done(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [stand_in("swap", "good"), stand_in("fleet", "fail")]
    run(parts)
    capsys.readouterr()
    assert run(parts, "--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("swap") and "1 s  title of swap [done in" in lines[0]
    assert lines[1].split() == ["python", "-m", "gpu_stand_in", "good", "--out", str(tmp_path / "out" / "swap.json")]
    assert "[failed: exit code 1: out of memory, say]" in lines[2]
    assert lines[-1].split() == ["all", "2", "s"]


def quick_factorization(folder: Path, device: str) -> None:
    """Run the real part, and compare its line with its record."""
    options = ["-o", str(folder), "--device", device, "--quick", "--only", "factorization"]
    assert gpu.main(options) == 0
    record = json.loads((folder / "factorization.json").read_text())
    samples = record["cases"]["2x96 gaussian"]["samples_ms"]
    ratio = median(samples["torch.linalg.svd"]) / median(samples["pivoted_qr"])
    table = (folder / "gpu.md").read_text()
    assert f"2 × 96², fp64: faster than `torch.linalg.svd` on the same device | {aims.number(ratio)} times" in table
    assert "2 projections of 128²" in table and "table: ten million customers in a session | not measured" in table
    part = make_parts(device, True)[0]
    assert Ledger(folder).done(part)


def test_the_cheapest_part_on_the_cpu(tmp_path: Path) -> None:
    quick_factorization(tmp_path, "cpu")


@pytest.mark.gpu
def test_the_cheapest_part_on_a_gpu(tmp_path: Path) -> None:
    quick_factorization(tmp_path, "cuda")
