"""One worker process: takes runs that nobody else has, trains them, and records each as it is done."""

import gc
import math
import sys
import time
import traceback
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from benchmarks.common.workers import OutOfTime, prepare_process, surroundings, take_all
from benchmarks.glue.loop import Schedule, Trace, train_model
from benchmarks.glue.methods import Method, Prepared, free, method_named, prepare
from benchmarks.glue.probe import probe
from benchmarks.glue.records import Record, append_record, claimed, known_seconds, read_records
from benchmarks.glue.runs import WARM_UP, Place, Run, undone
from benchmarks.glue.starts import (
    PRETRAINED,
    WARMED,
    WARMUP_EPOCHS,
    WARMUP_RATE,
    WARMUP_SHARE,
    Models,
    write_warmed,
)
from benchmarks.glue.tasks import ALL_TASKS, TENANTS, Rows, read_tokens
from qrlora_deploy.models.checkpoint import Checkpoint, open_checkpoint
from qrlora_deploy.tasks.regression import Regression
from qrlora_deploy.training.settings import STEP_LENGTH

PAUSE_S = 0.5
"""Between two looks for work, while others make what is needed."""

WARM_METHOD = Method(WARM_UP, "the start itself", WARMUP_RATE, "full")


@dataclass(frozen=True)
class Settings:
    """What all runs of a record have in common.

    Attributes:
        epochs: of every method.
        batch_size: rows a step.
        max_length: tokens a row.
        points: scores along a run.
        bf16: autocast.
        rows: bound on the rows of each part, for a trial; None is all.
        dropout: as the model has it, or none, in the warm-up too.
        held_out: share of GLUE's training rows that is scored instead of its dev rows; 0: the dev rows.
    """

    epochs: int = 3
    batch_size: int = 32
    max_length: int = 128
    points: int = 10
    bf16: bool = False
    rows: int | None = None
    dropout: bool = True
    held_out: float = 0.0

    def record(self, task: str, method: str) -> Record:
        """As kept with each run of a task and method: with the warm-up's, and with the run's own."""
        warm = {"warmup_rate": WARMUP_RATE, "warmup_epochs": WARMUP_EPOCHS, "warmup_share": WARMUP_SHARE}
        found = asdict(self) | warm | own_settings(task, method)
        # As the records from before there was a choice.
        usual = {"dropout": True, "held_out": 0.0}
        return {name: value for name, value in found.items() if (name, value) not in usual.items()}

    def record_again(self, record: Record) -> Record:
        """The settings that a recorded run would have now."""
        return self.record(record["task"], record["method"])


OWN_SETTINGS = ("start_bias", "step_length")


def own_settings(task: str, method: str) -> Record:
    """What only some runs depend on: where a regression's bias starts, and which rule gave QR-LoRA its rate."""
    own: Record = {}
    if ALL_TASKS[task].kind == Regression.name:
        own["start_bias"] = "mean"  # of the training labels
    if method != WARM_UP and method_named(method).kind == "qr":
        own["step_length"] = STEP_LENGTH
    return own


def is_current(record: Record) -> bool:
    """Whether a run's own settings are those that it would have now."""
    own, before = own_settings(record["task"], record["method"]), record["settings"]
    return all(before.get(name) == own.get(name) for name in OWN_SETTINGS)


@dataclass(frozen=True)
class Job:
    """What a worker is told.

    Attributes:
        plan: all runs, in order.
        place: the files.
        models: folder or hub name by model name.
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
    settings: Settings
    device: str
    workers: int
    launch: str
    deadline: float | None
    parent: int

    def done(self) -> set[str]:
        """Keys of the runs that need no more attention."""
        found = read_records(self.place.records)
        return {record["key"] for record in found if "error" not in record or record.get("launch") == self.launch}

    def failed(self) -> set[str]:
        """Keys of the runs that failed under this command, and of those that wait for what they would have made."""
        found = read_records(self.place.records)
        failed = {record["key"] for record in found if "error" in record and record.get("launch") == self.launch}
        return failed | {run.key for run in self.plan if run.start == WARMED and run.warm_up.key in failed}


class Worker:
    """Models and rows that stay on the device from run to run."""

    def __init__(self, job: Job, index: int) -> None:
        self.job = job
        self.index = index
        self._models: dict[str, Models] = {}
        self._rows: dict[str, tuple[dict[str, Rows], tuple[str, ...]]] = {}
        self._pace = 0.0
        self._known = known_seconds(job.place.output)

    def take(self) -> bool | None:
        """Do the first run that can be done.

        Returns:
            True where one was done, False where others hold or still prepare what is left, None
            where nothing is left.

        Raises:
            OutOfTime: the time is up, or would be before the end of any run that is left.
        """
        failed = self.job.failed()
        left = [run for run in undone(self.job.plan, self.job.place, self.job.done()) if run.key not in failed]
        late, held = False, False
        for run in left:
            if not self.job.place.is_ready(run):
                continue
            if not self._fits(run):
                late = True
                continue
            with claimed(self.job.place.claim(run)) as mine:
                # Another worker may have finished it since the records were read.
                if mine and undone([run], self.job.place, self.job.done()):
                    self._record(run)
                    return True
                held = True
        if late and not held:
            raise OutOfTime
        return False if left else None

    def _record(self, run: Run) -> None:
        common = {"key": run.key, **asdict(run), "launch": self.job.launch}
        common["settings"] = self.job.settings.record(run.task, run.method)
        try:
            record = self._do(run)
        except OutOfTime:
            raise
        except Exception as error:  # one bad run must not end the others; it is recorded and shown
            record = {"error": f"{type(error).__name__}: {error}"[:500]}
            traceback.print_exc()
        gc.collect()
        free(self.job.device)
        finished_at = {"finished": datetime.now(UTC).isoformat(timespec="seconds")}
        append_record(self.job.place.records, common | record | surroundings(self.job) | finished_at)
        shown = record.get("error") or f"{record['metrics']}  {record['train_seconds']:.1f} s"
        print(f"[{self.index}] {run.key}  {shown}", file=sys.stderr, flush=True)

    def _do(self, run: Run) -> Record:
        """Prepare and train; returns what is particular to the run."""
        began = time.perf_counter()
        method = WARM_METHOD if run.method == WARM_UP else method_named(run.method)
        task = ALL_TASKS[run.task]
        parts, labels = self._read_rows(run)
        epochs = WARMUP_EPOCHS if run.method == WARM_UP else self.job.settings.epochs
        if self.job.settings.held_out and run.task not in TENANTS:
            train, held_out = parts["train"].parted(self.job.settings.held_out)
            parts = {"train": train, "dev": held_out}
        if run.method == WARM_UP:
            parts = parts | {"train": parts["train"].first(WARMUP_SHARE, run.seed)}
        checkpoint, model = self._start(run, labels, parts["train"])
        others = _allocated(self.job.device) - sum(part.nbytes for part in (*model.parameters(), *model.buffers()))
        torch.manual_seed(run.seed)  # of PEFT's factors
        steps = epochs * math.ceil(len(parts["train"]) / self.job.settings.batch_size)
        prepared = prepare(method, model, checkpoint, run.start == PRETRAINED, labels, steps)
        free(self.job.device)
        if method.measured:
            found = probe(prepared.model, prepared.groups[0]["params"], task, parts["train"], run.seed)
            return _measured(found, prepared, time.perf_counter() - began)
        if self.job.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        schedule = self._schedule(epochs, run.seed)
        trace = train_model(prepared.model, prepared.groups, task, parts, schedule)
        self._pace = max(self._pace, (time.perf_counter() - began) / (epochs * len(parts["train"])))
        peak = torch.cuda.max_memory_allocated() - others if self.job.device == "cuda" else None
        if run.method == WARM_UP:
            write_warmed(model, checkpoint, self.job.place.warmed(run))
        return _result(trace, prepared, len(parts["train"])) | {
            "peak_bytes": peak,
            "seconds": round(time.perf_counter() - began, 2),
        }

    def _schedule(self, epochs: int, seed: int) -> Schedule:
        settings = self.job.settings
        return Schedule(epochs, settings.batch_size, settings.points, seed, settings.bf16, self.job.deadline)

    def _read_rows(self, run: Run) -> tuple[dict[str, Rows], tuple[str, ...]]:
        path = self.job.place.tokens(run)
        if path.name not in self._rows:
            self._rows[path.name] = read_tokens(path, self.job.device)
        return self._rows[path.name]

    def _start(self, run: Run, labels: tuple[str, ...], train: Rows) -> tuple[Checkpoint, Any]:
        """The checkpoint that the run starts from, and a model with its weights on the device.

        As in `warmup`, a fresh regression starts at the mean of the labels it trains on.
        """
        if run.model not in self._models:
            self._models[run.model] = Models(
                open_checkpoint(self.job.models[run.model]), self.job.device, self.job.settings.dropout
            )
        models, task = self._models[run.model], ALL_TASKS[run.task]
        if run.start == WARMED and run.method != WARM_UP:
            folder = self.job.place.warmed(run)
            return open_checkpoint(str(folder)), models.warmed(task, len(labels), folder)
        bias = float(train.targets.mean()) if task.kind == Regression.name else 0.0
        return models.checkpoint, models.fresh(task, len(labels), run.seed, bias)

    def _fits(self, run: Run) -> bool:
        """Whether a run would end in time: as long as one of its kind took, else by this worker's slowest."""
        if self.job.deadline is None:
            return True
        seconds = self._known.get((run.model, run.task, run.start, run.method))
        if seconds is None:
            share, epochs = (WARMUP_SHARE, WARMUP_EPOCHS) if run.method == WARM_UP else (1.0, self.job.settings.epochs)
            seconds = self._pace * share * epochs * len(self._read_rows(run)[0]["train"])
        return time.time() + seconds < self.job.deadline


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else 0


def _result(trace: Trace, prepared: Prepared, rows: int) -> Record:
    return {
        "learning_rate": prepared.rate,
        "metrics": trace.curve[-1]["metrics"],
        "curve": trace.curve,
        "rows": rows,
        "steps": trace.steps,
        "trainable_parameters": prepared.trainable,
        "file_bytes": prepared.file_bytes(),
        "train_seconds": round(trace.train_seconds, 3),
    }


def _measured(found: Record, prepared: Prepared, seconds: float) -> Record:
    own = {"learning_rate": prepared.rate, "trainable_parameters": prepared.trainable}
    return {"probe": found, "metrics": {}, "train_seconds": round(seconds, 2), "seconds": round(seconds, 2)} | own


def work(job: Job, index: int) -> None:
    """Take runs until none is left, the time is up, or the command has gone."""
    prepare_process(job)
    take_all(job, index, Worker(job, index).take, PAUSE_S)


def model_names(plan: Iterable[Run]) -> list[str]:
    """The models of a plan, each once, in order."""
    return list(dict.fromkeys(run.model for run in plan))
