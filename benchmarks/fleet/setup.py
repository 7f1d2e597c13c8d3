"""What is measured: a base, its basis, the customers' rows and the settings of every run."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.layers import LAST_LAYERS, TAU, targets_of
from benchmarks.fleet.shards import Shards, customer_name, read_shards, save_shape
from qrlora_deploy.data.examples import Examples
from qrlora_deploy.factorization.from_checkpoint import factorize
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.rank_rules.energy_share import EnergyShare
from qrlora_deploy.training.fleet.customers import FleetSource
from qrlora_deploy.training.fleet.grouping import read_groups
from qrlora_deploy.training.fleet.options import FleetOptions
from qrlora_deploy.training.fleet.run import train_fleet
from qrlora_deploy.training.settings import TrainSettings

TARGETS: dict[str, tuple[tuple[str, ...], int | None]] = {"paper": (("query",), LAST_LAYERS), "linear": ((), None)}
"""What the fleet adapts: projections, and how many of the last blocks."""


@dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        checkpoint: the base.
        basis: of its query projections.
        shards: where rows come from.
        settings: of every run.
        customers: how many the fleet trains.
        rows: of each customer.
        rows_per_step: of the fleet, or None.
        folder: for everything that is written.
    """

    checkpoint: Checkpoint
    basis: Basis
    shards: Shards
    settings: TrainSettings
    customers: int
    rows: int
    rows_per_step: int | None
    folder: Path

    def write_data(self, numbers: Sequence[int]) -> Path:
        """A file with the rows of these customers."""
        file = self.folder / f"{len(numbers)}-from-{numbers[0]}.tsv"
        self.shards.write(file, numbers, self.rows)
        return file

    def run_fleet(self, name: str, file: Path) -> Path:
        """Train the customers of a file into a folder of that name.

        Raises:
            SystemExit: one of them failed.
        """
        output = self.folder / name
        options = FleetOptions(output, rows_per_step=self.rows_per_step)
        source = FleetSource(file, customer_column="customer")
        report = train_fleet(self.checkpoint, self.basis, source, self.settings, options)
        if report.count("failed"):
            raise SystemExit(f"{report.count('failed')} customers failed: {report.summary}")
        return output

    def examples(self, numbers: Sequence[int]) -> list[Examples]:
        """The rows of some customers, as the fleet reads them."""
        groups = read_groups(self.write_data(numbers), "customer", None, None, lambda _: True)
        return [groups.examples[customer_name(number)] for number in numbers]


def build(options: argparse.Namespace, folder: Path) -> Bench:
    """Base and basis."""
    shards = read_shards(options.data)
    if options.model is None:
        save_shape(folder / "base", options.shape, shards)
    checkpoint = open_checkpoint(str(options.model or folder / "base"))
    targets = targets_of(checkpoint.skeleton(), *TARGETS[options.targets])
    basis = factorize(checkpoint, targets, EnergyShare(TAU))
    settings = TrainSettings(epochs=options.epochs, batch_size=options.batch_size, max_length=64, device=options.device)
    return Bench(checkpoint, basis, shards, settings, options.customers, options.rows, options.rows_per_step, folder)
