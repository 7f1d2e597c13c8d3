"""The fleet's profile: a stage has its own seconds, threads are told apart, and one step is looked into."""

import threading
from pathlib import Path

import pytest

from benchmarks.fleet.profile import STAGES, Split, StepView, lines
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import open_checkpoint
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.run import train_fleet
from tests.training.fleet.making import settings_of, write_folders


def test_every_stage_is_a_function_of_the_fleet() -> None:
    assert [name for name, owner, function in STAGES if not callable(getattr(owner, function, None))] == []


def test_a_stage_counts_its_own_seconds_and_threads_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("benchmarks.fleet.profile.time.perf_counter", lambda: clock[0])
    split = Split("cpu")

    def pass_by(seconds: float) -> None:
        clock[0] += seconds

    inner = split._timed("inner", pass_by)

    def nest() -> None:
        pass_by(1.0)
        inner(2.0)
        inner(3.0)
        pass_by(4.0)

    split._timed("outer", nest)()
    thread = threading.Thread(target=split._timed("aside", pass_by), args=(7.0,))
    thread.start()
    thread.join()
    record = split.record(20.0)
    assert record["host_seconds"] == {"outer": 5.0, "inner": 5.0, "everything else": 10.0}
    assert record["thread_seconds"] == {"aside": 7.0}


def test_a_fleet_is_split_and_one_step_looked_into(tiny_base: Path, tiny_basis: Basis, tmp_path: Path) -> None:
    names = write_folders(tmp_path)
    view, split = StepView("cpu"), Split("cpu")
    with view.watch(), split.watch():
        source = FleetSource(tmp_path / "data")
        train_fleet(
            open_checkpoint(str(tiny_base)), tiny_basis, source, settings_of(epochs=1), FleetOptions(tmp_path / "out")
        )
    record = {"split": split.record(60.0), "step": view.found}
    assert record["split"]["steps"] == 9 and record["split"]["host_seconds"]["launch steps"] > 0
    assert record["split"]["thread_seconds"]["make and write files"] > 0
    assert record["step"]["rows"] == 12 and record["step"]["kernels"] > 100 and record["step"]["tflop"] > 0
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(names)
    assert any("launch steps" in line for line in lines(record))
