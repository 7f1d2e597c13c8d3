"""What a process of the benchmark keeps from run to run, and the files that all of them read."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.decoder_rate.plan import SETUPS, Planned
from benchmarks.decoder_rate.runs import run
from benchmarks.decoder_rate.tasks import Task
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.models.targets import choose_targets
from qrlora_deploy.rank_rules.energy_share import EnergyShare


class _Worker:
    """What a process keeps from run to run."""

    tasks: dict[str, Task]
    checkpoint: Checkpoint
    bases: dict[str, Basis]
    device: str


def start(base: str, tasks: Sequence[Task], bases: dict[str, Path], device: str) -> None:
    """Open what all runs of this process need."""
    _Worker.tasks = {task.name: task for task in tasks}
    _Worker.checkpoint = open_checkpoint(base)
    _Worker.bases = {setup: read_basis(path) for setup, path in bases.items()}
    _Worker.device = device


def run_here(wanted: Planned, ends: float) -> dict[str, Any] | None:
    """The record of a run; None where the time is over, by `time.time()`."""
    if time.time() > ends:
        return None
    return run(wanted, _Worker.tasks[wanted.task], _Worker.checkpoint, _Worker.bases[wanted.setup], _Worker.device)


def make_bases(base: str, setups: Sequence[str], folder: Path, device: str) -> dict[str, Path]:
    """The file of each set-up's basis, which may be there already."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_checkpoint(base)
    files = {setup: folder / f"{setup.replace(' ', '-')}.safetensors" for setup in setups}
    for setup, file in files.items():
        if not file.is_file():
            names = choose_targets(checkpoint.skeleton(), SETUPS[setup])
            write_basis(factorize(checkpoint, names, EnergyShare(0.5), device), file)
    return files
