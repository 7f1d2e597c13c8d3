"""Settings of a training run and of a warm-up, checked when they are made."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qrlora_deploy.errors import InputError, ProviderError, argument
from qrlora_deploy.formats.basis import Basis
from qrlora_deploy.tasks.base import Task
from qrlora_deploy.tasks.options import AUTO
from qrlora_deploy.tasks.registry import BY_OPTION

MAX_RATE = 1e30
MAX_COUNT = 2**31 - 1
WHERE = ("device", "trunk_cache")
TRUNK_CACHES = ("auto", "device", "host", "disk", "off")
BASE_DTYPES = ("fp32", "bf16")
WARMUP_RATES = {"full": 5e-5, "head": 1e-3}

STEP_LENGTH = 2.76
"""Length of Adam's first steps in the space of all coefficients, each of which moves by the learning rate: the rate
times the square root of their number. The best rates found on MiniLM, 0.05 for 3,047 coefficients and 0.1 to 0.3 for
320, have about this length in common; see docs/preconditioning.md."""

LARGEST_STEP = 4.3
"""Bound of the default rate times the root of adapted layers and steps: a unit of a coefficient moves its layer alike,
however few directions the layer has, changes of layers add up, and a rate carries further the longer it works. At
larger ones runs on GLUE ended in one answer for every text; see docs/preconditioning.md."""

LARGEST_DEFAULT_RATE = 0.3
"""The largest rate that was tried; bases of fewer than 85 coefficients would get more."""


@dataclass(frozen=True)
class RunSettings:
    """What every run needs.

    Attributes:
        epochs: passes over the data.
        batch_size: rows a step.
        max_length: tokens a row; longer rows are cut.
        seed: of the order of the rows, dropout and a new head.
        device: "auto" (CUDA where there is one), "cpu" or "cuda". CUDA runs in bf16 where it can.
        task: what the labels are, by the option of a task, or "auto": what they look like.

    Raises:
        InputError: a value is out of range.
    """

    epochs: int = 5
    batch_size: int = 32
    max_length: int = 128
    seed: int = 0
    device: str = "auto"
    task: str = "auto"

    @property
    def labelled(self) -> bool:
        """Whether data must have labels."""
        return self.task == AUTO or BY_OPTION[self.task].has_labels

    @property
    def written(self) -> bool:
        """Whether data must be prompts with answers."""
        return self.task != AUTO and BY_OPTION[self.task].writes_text

    def __post_init__(self) -> None:
        if self.task not in (AUTO, *BY_OPTION):
            raise InputError(f"{argument('task')} must be one of {', '.join((AUTO, *BY_OPTION))}, not {self.task}")
        for name in ("epochs", "batch_size", "max_length"):
            if not 1 <= getattr(self, name) <= MAX_COUNT:
                raise InputError(
                    f"{argument(name)} must be at least 1 and at most {MAX_COUNT}, not {getattr(self, name)}"
                )
        if not 0 <= self.seed < 2**32:
            raise InputError(f"{argument('seed')} must be between 0 and {2**32 - 1}, not {self.seed}")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"{argument('device')} must be auto, cpu or cuda, not {self.device}")


@dataclass(frozen=True)
class TrainSettings(RunSettings):
    """Settings of `train`.

    Attributes:
        learning_rate: peak, in the preconditioned space (`adapter.precondition`), where one value
            serves all coefficients; it falls linearly to 0 after a warm-up of 6 % of the steps. None is
            `default_rate` of basis and steps, which `resolved` fills in.
        head_learning_rate: of the output layer where it trains too.
        patience: epochs without a better score before the run stops; needs evaluation data.
        head: "frozen" (the coefficients alone are trained) or "output" (the last projection too).
        metric: chooses the best epoch; the first one of the task where it is None.
        dropout: whether the frozen base drops out as its config says; then its trunk cannot be cached.
        trunk_cache: where the hidden states below the first adapted block are kept: "device", "host"
            (memory), "disk", "auto" (the first of these with room, or none where the model does not
            allow it) or "off".
        tune_thresholds: whether the probability from which on each label of a multi-label customer applies is chosen
            on the held-out rows, instead of 0.5.
        packing: whether rows that are written on share rows of a batch, so that less of it is padding; each sees itself
            alone.
        base_dtype: in which the frozen base computes, "fp32" or "bf16"; coefficients are fp32.
    """

    learning_rate: float | None = None
    head_learning_rate: float = 1e-3
    patience: int = 3
    head: str = "frozen"
    metric: str | None = None
    dropout: bool = False
    trunk_cache: str = "auto"
    tune_thresholds: bool = False
    packing: bool = False
    base_dtype: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            _check_rate("learning_rate", self.learning_rate)
        _check_rate("head_learning_rate", self.head_learning_rate)
        if not 1 <= self.patience <= MAX_COUNT:
            raise InputError(f"{argument('patience')} must be at least 1 and at most {MAX_COUNT}, not {self.patience}")
        if self.head not in ("frozen", "output"):
            raise InputError(f"{argument('head')} must be frozen or output, not {self.head}")
        if self.trunk_cache not in TRUNK_CACHES:
            raise InputError(
                f"{argument('trunk_cache')} must be one of {', '.join(TRUNK_CACHES)}, not {self.trunk_cache}"
            )
        if self.base_dtype not in BASE_DTYPES:
            raise InputError(f"{argument('base_dtype')} must be one of {', '.join(BASE_DTYPES)}, not {self.base_dtype}")
        if self.dropout and self.trunk_cache not in ("auto", "off"):
            raise InputError(
                f"{argument('dropout', True)} changes what the trunk answers in each step; "
                f"not with {argument('trunk_cache', self.trunk_cache)}"
            )

    @property
    def rate(self) -> float:
        """The learning rate of settings that are `resolved`.

        Raises:
            RuntimeError: it is not known yet.
        """
        if self.learning_rate is None:
            raise RuntimeError("the learning rate depends on basis and rows; call resolved() first")
        return self.learning_rate

    def resolved(self, basis: Basis, factor: float = 1.0, rows: int = 1) -> Self:
        """The same with a learning rate: the one that was given, or the default for this run.

        Args:
            basis: whose coefficients are trained.
            factor: of the task, `Task.rate_factor`.
            rows: of the training data, as they were read.
        """
        if self.learning_rate is not None:
            return self
        rate = default_rate(basis.total_rank, factor, len(basis.targets), self.steps(rows))
        return replace(self, learning_rate=rate)

    def steps(self, rows: int) -> int:
        """Of the optimizer over so many rows, if no run of epochs without a gain ends it before."""
        return self.epochs * math.ceil(rows / self.batch_size)

    def check_tuning(self, task: Task, held_out: bool) -> None:
        """Make sure that thresholds can be tuned where that is asked for.

        Raises:
            InputError: there are no held-out rows, or the task decides without thresholds.
        """
        if not self.tune_thresholds:
            return
        if not held_out:
            raise InputError(
                f"{argument('tune_thresholds')} chooses them on held-out rows; give {argument('evaluation')}"
            )
        if not task.judges_labels:
            raise InputError(f"{argument('tune_thresholds')}: {task.name} decides without thresholds; leave it out")

    def check_batches(self, task: Task, rows: int) -> None:
        """Make sure that steps over so many rows can teach a task anything.

        Raises:
            InputError: a step would have too few rows for its loss.
        """
        if self.batch_size < task.least_batch:
            raise InputError(
                f"{argument('batch_size', self.batch_size)}: a {task.name} learns from {task.least_batch} rows a step "
                f"or more, each against the others"
            )
        if rows < task.least_batch:
            raise InputError(
                f"{argument('data')} holds {rows} row; a {task.name} learns from {task.least_batch} or more, each "
                f"against the others"
            )

    def check_packing(self, task: Task) -> None:
        """Refuse, by an InputError, packing where rows are not written on."""
        if self.packing and not task.writes_text:
            raise InputError(
                f"{argument('packing', True)} is for prompts with answers; rows of {task.name} have no other layout"
            )

    def metric_of(self, task: Task) -> str:
        """The metric that chooses the best epoch of a `task`.

        Raises:
            InputError: the task has no such metric.
        """
        if self.metric is not None and self.metric not in task.metrics:
            raise InputError(
                f"{argument('metric')} must be one of {', '.join(task.metrics)} for {task.name}, not {self.metric}"
            )
        return self.metric or task.metrics[0]


@dataclass(frozen=True)
class WarmupSettings(RunSettings):
    """Settings of `warmup`.

    Attributes:
        mode: "full" (all parameters) or "head" (only the pooler and what follows it).
        learning_rate: peak; `WARMUP_RATES` of the mode where it is None.
    """

    epochs: int = 3
    mode: str = "full"
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in WARMUP_RATES:
            raise InputError(f"{argument('mode')} must be full or head, not {self.mode}")
        _check_rate("learning_rate", self.rate)

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        return WARMUP_RATES[self.mode] if self.learning_rate is None else self.learning_rate


def default_rate(coefficients: int, factor: float = 1.0, layers: int = 1, steps: int = 1) -> float:
    """The learning rate of a run: `factor * STEP_LENGTH / sqrt(coefficients)` where that is not too much for it.

    It is at most `factor * LARGEST_STEP / sqrt(layers * steps)`, and `LARGEST_DEFAULT_RATE`. 0.15 for 320 coefficients,
    0.05 for 3,047, 0.024 for 12,753; 3,047 in 36 layers have 0.025 where there are 800 steps. Three digits, so that
    what a record shows can be given by hand.

    Args:
        coefficients: how many are trained.
        factor: of the task: 1 of classifiers, 3 of decoders that write text.
        layers: that have coefficients.
        steps: of the optimizer.
    """
    rate = factor * min(STEP_LENGTH / math.sqrt(coefficients), LARGEST_STEP / math.sqrt(layers * steps))
    return min(LARGEST_DEFAULT_RATE, float(f"{rate:.3g}"))


def fingerprint(settings: RunSettings, **parts: Any) -> dict[str, Any]:
    """What a run must have in common with the one it resumes; where it runs may differ.

    What earlier versions could not ask for, a task by its name and thresholds, is left out where it was not asked
    for: their runs are the same.
    """
    marks = {name: value for name, value in asdict(settings).items() if name not in WHERE}
    newer = {"task": AUTO, "tune_thresholds": False, "packing": False, "base_dtype": "fp32"}
    return {name: value for name, value in marks.items() if (name, value) not in newer.items()} | parts


def choose_device(device: str) -> str:
    """ "cpu" or "cuda".

    Raises:
        ProviderError: CUDA was asked for where there is none; there is no silent fall-back.
    """
    # Imported here: settings are checked before the second that torch takes.
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ProviderError(
            f"{argument('device', 'cuda')} was asked for, but PyTorch finds no CUDA device; "
            f"use {argument('device', 'cpu')}"
        )
    return "cuda" if available and device != "cpu" else "cpu"


def diverged(what: str) -> str:
    """A message of training that ran off: what became of it, and what helps."""
    return f"{what}; try a smaller {argument('learning_rate')}"


def _check_rate(name: str, rate: float) -> None:
    # Above, the optimizer overflows fp32 before the loss can say that the run diverged.
    if not 0 < rate <= MAX_RATE:
        raise InputError(f"{argument(name)} must be above 0 and at most {MAX_RATE:g}, not {rate}")
