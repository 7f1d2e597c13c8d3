"""The GPU benchmark: its table says what the records say, and no part that fails or hangs costs another."""

import argparse
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.aims import number
from benchmarks.gpu.parts import Part, failed_checks, make_parts
from benchmarks.gpu.running import Ledger

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
    assert f"2 × 96², fp64: faster than `torch.linalg.svd` on the same device | {number(ratio)} times" in table
    assert "2 projections of 128²" in table and "table: ten million customers in a session | not measured" in table
    part = make_parts(device, True)[0]
    assert Ledger(folder).done(part)


def test_the_cheapest_part_on_the_cpu(tmp_path: Path) -> None:
    quick_factorization(tmp_path, "cpu")


@pytest.mark.gpu
def test_the_cheapest_part_on_a_gpu(tmp_path: Path) -> None:
    quick_factorization(tmp_path, "cuda")
