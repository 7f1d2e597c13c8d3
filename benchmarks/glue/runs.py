"""Which runs there are, in which order, and what each one waits for."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.glue.starts import WARMED

WARM_UP = "warm-up"
"""Name of the method of the runs that make the warmed-up starts."""


RECORDS = "runs.jsonl"


@dataclass(frozen=True)
class Run:
    """One training: a model, a task, a start, a method and a seed."""

    model: str
    task: str
    start: str
    method: str
    seed: int

    @property
    def key(self) -> str:
        """Names the run in the records."""
        return f"{self.model}/{self.task}/{self.start}/{self.method}/{self.seed}"

    @property
    def warm_up(self) -> "Run":
        """The run that makes the warmed-up start of this one."""
        return replace(self, start=WARMED, method=WARM_UP)

    @property
    def start_key(self) -> str:
        """Names the warmed-up start, which the methods share."""
        return f"{self.model}.{self.task}.{self.seed}"


@dataclass(frozen=True)
class Choice:
    """What is to be run, each in the order of importance."""

    models: tuple[str, ...]
    tasks: tuple[str, ...]
    starts: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]


def make_plan(choice: Choice) -> list[Run]:
    """All runs, so ordered that a table is balanced wherever the time ends.

    Models, then starts, then seeds are outermost: a whole table of one seed before the next seed.
    The warm-ups of a model come before everything that needs them.
    """
    plan = []
    for model in choice.models:
        if WARMED in choice.starts:
            plan += [Run(model, task, WARMED, WARM_UP, seed) for seed in choice.seeds for task in choice.tasks]
        for start in choice.starts:
            for seed in choice.seeds:
                plan += [Run(model, task, start, method, seed) for task in choice.tasks for method in choice.methods]
    return plan


def read_plan(path: Path) -> list[Run]:
    """The runs of a file of keys, in its order, each warm-up before the first run that needs it."""
    plan: dict[str, Run] = {}
    for line in path.read_text(encoding="utf-8").split():
        model, task, start, method, seed = line.split("/")
        run = Run(model, task, start, method, int(seed))
        if start == WARMED:
            plan.setdefault(run.warm_up.key, run.warm_up)
        plan.setdefault(run.key, run)
    return list(plan.values())


@dataclass(frozen=True)
class Place:
    """The files of a benchmark.

    Attributes:
        output: folder of what is kept: records, table, plots.
        work: folder of what can be made again: tokens, warmed-up checkpoints, claims.
    """

    output: Path
    work: Path

    @property
    def records(self) -> Path:
        """The JSON lines."""
        return self.output / RECORDS

    def tokens(self, run: Run) -> Path:
        """The tokenised task."""
        return self.work / f"{run.model}.{run.task}.tokens.safetensors"

    def warmed(self, run: Run) -> Path:
        """The warmed-up checkpoint."""
        return self.work / "warmed" / run.start_key

    def claim(self, run: Run) -> Path:
        """Locked by the worker that does the run."""
        return self.work / "claims" / run.key.replace("/", ".")

    def is_ready(self, run: Run) -> bool:
        """Whether everything that the run needs is there."""
        needs_warm = run.start == WARMED and run.method != WARM_UP
        return self.tokens(run).is_file() and (not needs_warm or self.warmed(run).is_dir())

    def make(self) -> None:
        """Make the folders."""
        for folder in (self.output, self.work, self.work / "warmed", self.work / "claims"):
            folder.mkdir(parents=True, exist_ok=True)


def undone(plan: Iterable[Run], place: Place, done: set[str]) -> list[Run]:
    """Runs that are not recorded; a warm-up counts only with its checkpoint, which may have been removed."""
    return [run for run in plan if run.key not in done or (run.method == WARM_UP and not place.warmed(run).is_dir())]
