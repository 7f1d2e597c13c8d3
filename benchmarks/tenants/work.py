"""One worker process: takes runs that nobody else has, does them, and records each as it is done."""

import gc
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.common.workers import OutOfTime, prepare_process, surroundings, take_all
from benchmarks.glue.loop import Schedule, train_model
from benchmarks.glue.methods import HEAD_RATE, free, head_names
from benchmarks.glue.records import Record, append_record, claimed, read_records
from benchmarks.glue.starts import Models, write_warmed
from benchmarks.glue.tasks import Rows, read_tokens
from benchmarks.tenants.customers import POOL, TASK, Data, Split
from benchmarks.tenants.methods import (
    METHODS,
    OF_THE_BASE,
    OWN,
    base_basis,
    kinds_of,
    prepare,
    sensitive_basis,
    whitened_basis,
)
from benchmarks.tenants.plan import BASES, ENCODER, START, Place, Run, undone
from qrlora_deploy.formats.basis import Basis, read_basis, write_basis
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.training.settings import STEP_LENGTH

PAUSE_S = 0.2
"""Between two looks for work, while others make what is needed."""

HEAD_SHARE = 0.25
"""Of the training rows, drawn by the split's number, that a head is fitted on."""

POOL_STEPS = 3
"""How many times as long the pool's head is fitted: it has ten times as many labels."""


@dataclass(frozen=True)
class Settings:
    """What all runs of a record have in common.

    Attributes:
        epochs: of every method.
        batch_size: rows a step.
        max_length: tokens a row.
        train_rows: most training rows of a customer.
        test_rows: most test rows.
        head_steps: of the fit of a customer's head, at the rate of heads.
        bf16: autocast.
    """

    epochs: int = 3
    batch_size: int = 32
    max_length: int = 96
    train_rows: int = 2000
    test_rows: int = 2000
    head_steps: int = 400
    bf16: bool = False

    @property
    def record(self) -> Record:
        """As kept with each run."""
        return asdict(self) | {"head_share": HEAD_SHARE, "step_length": STEP_LENGTH}


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        plan: all runs, in order.
        place: the files.
        models: folder by model name.
        data: folder of the customers.
        settings: of all runs.
        device: "cpu" or "cuda".
        workers: how many there are.
        launch: names this command; a run that failed is tried again by the next one.
        deadline: `time.time()` at which to stop, or None.
        parent: process that started the workers; without it they stop.
    """

    plan: tuple[Run, ...]
    place: Place
    models: dict[str, str]
    data: str
    settings: Settings
    device: str
    workers: int
    launch: str
    deadline: float | None
    parent: int

    def done(self) -> set[str]:
        """Keys of the runs that are recorded."""
        return {record["key"] for record in read_records(self.place.records) if "error" not in record}

    def left(self) -> list[Run]:
        """The runs that are to be done, without those that failed since the command began."""
        found = read_records(self.place.records)
        failed = {record["key"] for record in found if "error" in record and record.get("launch") == self.launch}
        return undone(self.plan, self.place, {record["key"] for record in found if "error" not in record}, failed)

    @property
    def rows(self) -> Data:
        """Where the customers' rows are."""
        return Data(Path(self.data), self.settings.train_rows, self.settings.test_rows)


class Worker:
    """Models and rows that stay on the device from run to run."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self._models: dict[str, Models] = {}

    def take(self) -> bool | None:
        """Do the first run that can be done.

        Returns:
            True where one was done, False where others hold or still prepare what is left, None where nothing is left.

        Raises:
            OutOfTime: the time is up.
        """
        left = self.job.left()
        for run in left:
            if self.job.deadline is not None and time.time() > self.job.deadline:
                raise OutOfTime
            if not all(path.exists() for path in self.job.place.needs(run)):
                continue
            with claimed(self.job.place.claim(run)) as mine:
                # Another worker may have finished it since the records were read.
                if mine and run in self.job.left():
                    self._record(run)
                    return True
        return False if left else None

    def _record(self, run: Run) -> None:
        began = time.perf_counter()
        common = {"key": run.key, **asdict(run), "launch": self.job.launch, "settings": self.job.settings.record}
        try:
            record = self._do(run)
        except OutOfTime:
            raise
        except Exception as error:  # one bad run must not end the others; it is recorded and shown
            record = {"error": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        gc.collect()
        free(self.job.device)
        ended = {
            "seconds": round(time.perf_counter() - began, 2),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        append_record(self.job.place.records, common | record | surroundings(self.job) | ended)
        shown = record.get("error") or record.get("accuracy", "made")
        print(f"[{self.index}] {run.key}  {shown}  {ended['seconds']} s", file=sys.stderr, flush=True)

    def _do(self, run: Run) -> Record:
        if run.method == BASES:
            return self._make_bases(run)
        parts, labels = read_tokens(self.job.place.tokens(run), self.job.device)
        return self._fit_head(run, parts, labels) if run.method == START else self._train(run, parts, labels)

    def _make_bases(self, run: Run) -> Record:
        base, device = self._of(run).checkpoint, self.job.device
        if run.customer == ENCODER:
            found = {name: base_basis(name, base, device) for name in OF_THE_BASE}
        else:
            data = self.job.rows.pooled(Split(run.split))
            full = read_basis(self.job.place.basis(run, "full"))
            start = open_checkpoint(str(self.job.place.start(run)))
            found = {
                "sensitivity": sensitive_basis(start, full, data, device),
                "whiten": whitened_basis(base, data, device),
            }
        for name, basis in found.items():
            write_basis(basis, self.job.place.basis(run, name))
        return {"bases": {name: {"total": basis.total_rank, "kinds": kinds_of(basis)} for name, basis in found.items()}}

    def _fit_head(self, run: Run, parts: dict[str, Rows], labels: tuple[str, ...]) -> Record:
        models = self._of(run)
        model = models.fresh(TASK, len(labels), run.split)
        model.config.id2label = dict(enumerate(labels))
        model.config.label2id = {label: index for index, label in enumerate(labels)}
        model.requires_grad_(False)
        head = [model.get_parameter(name) for name in head_names(model)]
        for parameter in head:
            parameter.requires_grad_(True)
        rows = parts | {"train": parts["train"].first(HEAD_SHARE, run.split)}
        steps = self.job.settings.head_steps * (POOL_STEPS if run.customer == POOL else 1)
        epochs = -(-steps * self.job.settings.batch_size // len(rows["train"]))
        record = self._run(run, model, [{"params": head, "lr": HEAD_RATE}], rows, epochs)
        # bf16 was for computing: what is written is the encoder as it was, with the head beside it.
        fresh = models.fresh(TASK, len(labels), run.split)
        weights = {name: model.get_parameter(name) for name in head_names(model)}
        fresh.load_state_dict(weights, strict=False)
        fresh.config = model.config
        write_warmed(fresh, models.checkpoint, self.job.place.start(run))
        return record | {"rows": len(rows["train"]), "labels": len(labels)}

    def _train(self, run: Run, parts: dict[str, Rows], labels: tuple[str, ...]) -> Record:
        method, place = METHODS[run.method], self.job.place
        model = self._of(run).warmed(TASK, len(labels), place.start(run))
        basis = self._basis(run, method.basis) if method.basis else None
        torch.manual_seed(run.split)  # of PEFT's factors
        steps = self.job.settings.epochs * -(-len(parts["train"]) // self.job.settings.batch_size)
        trained, groups, rate = prepare(method, model, basis, steps)
        record = self._run(run, trained, groups, parts, self.job.settings.epochs)
        numbers = sum(parameter.numel() for parameter in groups[0]["params"])
        return record | {"learning_rate": rate, "trainable_parameters": numbers, "rows": len(parts["train"])}

    def _basis(self, run: Run, name: str) -> Basis:
        if name != OWN:
            return read_basis(self.job.place.basis(run, name))
        start: Checkpoint = open_checkpoint(str(self.job.place.start(run)))
        data = [self.job.rows.parts(run.customer)["train"]]
        return sensitive_basis(start, read_basis(self.job.place.basis(run, "full")), data, self.job.device)

    def _run(self, run: Run, model: Any, groups: list[dict[str, Any]], parts: dict[str, Rows], epochs: int) -> Record:
        settings = self.job.settings
        schedule = Schedule(epochs, settings.batch_size, 1, run.split, settings.bf16, self.job.deadline)
        trace = train_model(model, groups, TASK, parts, schedule)
        scores = [point["metrics"]["accuracy"] for point in trace.curve]
        return {
            "accuracy": scores[-1],
            "start_accuracy": scores[0],
            "loss": trace.curve[-1]["loss"],
            "steps": trace.steps,
            "train_seconds": round(trace.train_seconds, 3),
        }

    def _of(self, run: Run) -> Models:
        if run.model not in self._models:
            self._models[run.model] = Models(open_checkpoint(self.job.models[run.model]), self.job.device)
        return self._models[run.model]


def work(job: Job, index: int) -> None:
    """Take runs until none is left, the time is up, or the command has gone."""
    prepare_process(job)
    take_all(job, index, Worker(job, index).take, PAUSE_S)
