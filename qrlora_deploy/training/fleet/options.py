"""How a fleet runs, and what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qrlora_deploy.errors import InputError, argument
from qrlora_deploy.formats.coefficients import SUFFIX
from qrlora_deploy.io.outputs import check_file, check_report_folder
from qrlora_deploy.io.temporary import remove_dead
from qrlora_deploy.training.fleet.customers import Customer, Shard
from qrlora_deploy.training.fleet.summary import TRAINED, Line, summary_file

ROWS_PER_STEP = {"cpu": 256, "cuda": 4096}


@dataclass(frozen=True)
class FleetOptions:
    """How a fleet runs; none of it changes what a customer becomes, but for rounding.

    Attributes:
        output: folder of the customers' files and the summary; made if it is missing.
        resume: pass over customers whose file is there with the same data, settings, base and basis.
        rows_per_step: rows of all customers together in a step; a batch of one customer at least. By
            the device, `ROWS_PER_STEP`, where it is None.
        shard: whose customers are trained.
        local_rank: which of several GPUs is used.
        basis_file: where the basis is, for the records.
        tell: called with a line that says what a resumed run keeps and what it trains again.

    Raises:
        InputError: a value is out of range.
    """

    output: Path
    resume: bool = False
    rows_per_step: int | None = None
    shard: Shard = field(default_factory=Shard)
    local_rank: int = 0
    basis_file: str = ""
    tell: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        if self.rows_per_step is not None and self.rows_per_step < 1:
            raise InputError(f"{argument('rows_per_step')} must be at least 1, not {self.rows_per_step}")

    def file_of(self, name: str) -> Path:
        """The file of a customer."""
        return self.output / f"{name}{SUFFIX}"

    def slots(self, device: str, batch_size: int, customers: int) -> int:
        """How many customers train side by side."""
        rows = self.rows_per_step or ROWS_PER_STEP[device]
        return max(1, min(rows // batch_size, customers))

    def open_output(self, customers: Sequence[Customer]) -> None:
        """Make the output folder, and make sure that no file would be overwritten unasked.

        Unfinished files that a killed run left are removed; those of other shards, which run, stay.

        Raises:
            InputError: it cannot be made, or holds files of these customers and `resume` is not set, or
                something that is no plain file has the name of one.
        """
        check_report_folder(self.output)
        try:
            self.output.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(f"{self.output} cannot be made: {error.strerror or error}") from error
        files = [self.file_of(item.name) for item in customers] + [summary_file(self.output, self.shard)]
        remove_dead(self.output, [file.name for file in files])
        for file in files:
            check_file(file, with_parent=False)
        if self.resume:
            return
        there = [item.name for item in customers if self.file_of(item.name).exists()]
        if there:
            raise InputError(
                f"{self.output} holds files of {len(there)} of these customers, such as {there[0]}{SUFFIX}; "
                f"pass over finished ones by {argument('resume', True)}, or give another {argument('output')}"
            )


@dataclass(frozen=True)
class FleetReport:
    """What became of a fleet.

    Attributes:
        lines: one a customer.
        strangers: customers with held-out rows alone, of whom nothing was made.
        seconds: from the start of reading the data.
        summary: the file of the lines.
    """

    lines: list[Line]
    strangers: int
    seconds: float
    summary: Path

    def count(self, status: str) -> int:
        """How many customers ended so."""
        return sum(line.status == status for line in self.lines)

    @property
    def customers_per_minute(self) -> float:
        """Customers trained in this run by its time."""
        return 60 * self.count(TRAINED) / self.seconds if self.seconds else 0.0
