"""Which runs there are, in which order, what each needs and what it makes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.tenants.customers import POOL, Split
from benchmarks.tenants.methods import METHODS, OF_THE_BASE, OF_THE_POOL, OWN, basis_file

RECORDS = "runs.jsonl"

START = "start"
"""Method of the runs that fit a head to the encoder."""

BASES = "bases"
"""Method of the runs that make bases: of the encoder, or of a pool."""

ENCODER = "encoder"
"""Customer of the bases that need no data."""


@dataclass(frozen=True)
class Run:
    """One training, or one making of bases."""

    model: str
    split: int
    customer: str
    method: str

    @property
    def key(self) -> str:
        """Names the run in the records."""
        return f"{self.model}/{self.split}/{self.customer}/{self.method}"


def make_plan(models: Sequence[str], splits: Sequence[int], methods: Sequence[str]) -> list[Run]:
    """All runs, a whole table of one split before the next one; what others wait for comes first."""
    plan = []
    for model in models:
        plan.append(Run(model, 0, ENCODER, BASES))
        for number in splits:
            split = Split(number)
            plan += [Run(model, number, customer, START) for customer in (POOL, *split.judged_on)]
            plan.append(Run(model, number, POOL, BASES))
            plan += [Run(model, number, customer, method) for method in methods for customer in split.judged_on]
    return plan


@dataclass(frozen=True)
class Place:
    """The files.

    Attributes:
        output: folder of what is kept: records and the table.
        work: folder of what can be made again.
    """

    output: Path
    work: Path

    @property
    def records(self) -> Path:
        """The JSON lines."""
        return self.output / RECORDS

    def tokens(self, run: Run) -> Path:
        """The rows of a run's customer, which are those of its split where it is the pool."""
        split = f".{run.split}" if run.customer == POOL else ""
        return self.work / f"{run.model}.{run.customer}{split}.tokens.safetensors"

    def start(self, run: Run) -> Path:
        """The checkpoint with the customer's head."""
        return self.work / "starts" / f"{run.model}.{run.split}.{run.customer}"

    def basis(self, run: Run, name: str) -> Path:
        """The file of a basis that runs share."""
        shared = f"{run.model}.{name}" if name in OF_THE_BASE else f"{run.model}.{run.split}.{name}"
        return basis_file(self.work / "bases", shared)

    def claim(self, run: Run) -> Path:
        """Locked by the worker that does the run."""
        return self.work / "claims" / run.key.replace("/", ".")

    def needs(self, run: Run) -> list[Path]:
        """What must be there before a run can begin."""
        if run.customer == ENCODER:
            return []
        if run.method == START:
            return [self.tokens(run)]
        if run.method == BASES:
            return [self.start(run), self.basis(run, "full")]
        basis = METHODS[run.method].basis
        files = [self.basis(run, "full" if basis == OWN else basis)] if basis else []
        return [self.tokens(run), self.start(run), *files]

    def makes(self, run: Run) -> list[Path]:
        """What is there after it."""
        if run.method == START:
            return [self.start(run)]
        if run.method == BASES:
            return [self.basis(run, name) for name in (OF_THE_BASE if run.customer == ENCODER else OF_THE_POOL)]
        return []

    def make(self) -> None:
        """Make the folders."""
        for folder in (self.output, *(self.work / name for name in ("starts", "bases", "claims"))):
            folder.mkdir(parents=True, exist_ok=True)


def undone(plan: Iterable[Run], place: Place, done: set[str], failed: set[str]) -> list[Run]:
    """Runs that are not recorded, or whose files are gone; without those that failed, and those that need what these
    would have made."""
    left: list[Run] = []
    lacking: set[Path] = set()
    for run in plan:
        made = all(path.exists() for path in place.makes(run))
        if run.key in failed or not lacking.isdisjoint(place.needs(run)):
            lacking |= {path for path in place.makes(run) if not path.exists()}
        elif run.key not in done or not made:
            left.append(run)
    return left
